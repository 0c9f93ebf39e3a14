"""Which trial is next, and what came of each? The state of a sweep, whoever runs its trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dpa_ray.recipe import RecipeError, parse
from dpa_ray.sweep.record import Record, Trial, one_line
from dpa_ray.sweep.search import Search, Tried
from dpa_ray.sweep.sharing import chain, choose
from dpa_ray.sweep.space import Point, describe, laid_over

LOOK_EVERY_S = 1.0
"""How often to look in the store whether a running trial has made what others wait for."""

WAITING, RUNNING, DONE, STOPPED, FAILED, INTERRUPTED = "waiting", "running", "done", "stopped", "failed", "interrupted"


class Sweep:
    """A sweep's trials: which wait, which run, what came of each. Every change goes to its record at once; nothing but a
    search that finds no point raises."""

    def __init__(
        self,
        record: Record,
        search: Search,
        base: dict[str, Any],
        *,
        max_running: Callable[[], int] = lambda: 1,
        label: Callable[[Point], Mapping[str, Any]] = lambda point: {},
        tell: Callable[[str], None] = lambda text: None,
        release: Callable[[str], None] = lambda name: None,
    ):
        """`max_running` says how many trials there is room for; `label` what else is told of a point; `release` forgets the claims of a trial that is no more."""
        self.record, self.search, self.base = record, search, base
        self.max_running, self.label, self.tell, self.release = max_running, label, tell, release
        self.running: dict[str, float] = {}  # name -> begun, by time.monotonic
        self.before_s: dict[str, float] = {}  # its earlier attempts
        self.lost_s: dict[str, float] = {}  # unfinished_s of the attempts before
        self.budget_is_over = False
        self.nothing_until = 0.0  # by time.monotonic: till then each would wait, unless something happens
        self.chains: dict[str, tuple[str, ...]] = {}
        for trial in record.trials[: search.num_trials]:
            if trial["status"] == FAILED:  # an earlier attempt's; what it had finished is there
                trial["status"] = INTERRUPTED
            if self._is_to_do(trial):
                self._check(trial)

    def trial(self, name: str) -> Trial:
        return next(trial for trial in self.record.trials if trial["name"] == name)

    def next(self) -> Trial | None:
        """A trial to start now, or None where there is no room, or each would only wait for one that runs."""
        if time.monotonic() < self.nothing_until or len(self.running) >= self.max_running():
            return None
        waiting = [t for t in self.record.trials if self._is_to_do(t)]
        made = {link for t in self.record.trials if t["status"] == DONE for link in self._chain(t)}
        made |= {link for name in self.running for link in self._links_made(self.trial(name))}
        running = [self._chain(self.trial(name)) for name in self.running]
        while not waiting and len(self.record.trials) < self.search.num_trials:
            waiting = [trial for trial in [self._propose()] if self._is_to_do(trial)]
        number = choose([self._chain(t) for t in waiting], running, made)
        if number is None:
            self.nothing_until = time.monotonic() + LOOK_EVERY_S
            return None
        trial = waiting[number]
        trial |= {"status": RUNNING, "reason": None}
        self.running[trial["name"]] = time.monotonic()
        self.before_s[trial["name"]] = trial["wall_time_s"]
        self.record.keep()
        self.tell(f"{trial['name']} starts: {describe(trial['overrides'])}")
        return trial

    @property
    def is_over(self) -> bool:
        """Has every trial been started?"""
        return len(self.record.trials) >= self.search.num_trials and not any(map(self._is_to_do, self.record.trials))

    def propose_all(self) -> None:
        """Every trial of a search that needs no results."""
        while len(self.record.trials) < self.search.num_trials:
            self._propose()

    def saw(self, name: str, result: dict[str, Any]) -> None:
        """What a trial told."""
        self.nothing_until = 0.0
        trial = self.trial(name)
        numbers = {k: v for k, v in result.items() if "." in k and isinstance(v, int | float)}
        trial["metrics"] |= numbers
        if "artifacts" in result:  # an attempt begins; what earlier ones spent on a stage that broke off stays spent
            self.lost_s[name] = trial["unfinished_s"]
        if "unfinished_s" in result:
            if not result["unfinished_s"]:  # its artifact has it from here on
                self.lost_s[name] = 0.0
            trial["unfinished_s"] = self.lost_s.get(name, 0.0) + result["unfinished_s"]
        for key in ("artifacts", "at"):
            if key in result:
                trial[key] = result[key]
        if "final" in result:
            trial |= {"status": DONE, "metrics": result["final"], "unfinished_s": 0.0}
        elif "failed" in result:
            trial |= {"status": FAILED, "reason": result["failed"]}
        self._timed(trial)
        self.record.keep()

    def ended(self, name: str, error: str | None = None) -> None:
        """A trial is no more; one that told no end was stopped, or (with `error`) died."""
        self.nothing_until = 0.0
        trial = self.trial(name)
        if trial["status"] == RUNNING:
            if error is not None:
                trial |= {"status": FAILED, "reason": error}
            elif self.budget_is_over:
                trial |= {"status": INTERRUPTED, "reason": "the time budget is over; it goes on when started again"}
            else:
                stage, step = trial["at"] or ["its beginning", 0]
                trial |= {"status": STOPPED, "reason": f"ASHA stopped it at {stage}, step {step}"}
        self._timed(trial)
        self.running.pop(name, None)
        self.release(name)
        self.record.keep()
        self.tell(f"{name} {_outcome(trial, self.record.values['metric'])}")

    def cut(self) -> None:
        """All trials were ended at once: those under way are interrupted."""
        why = "the time budget is over" if self.budget_is_over else "the sweep ended"
        for name in list(self.running):
            trial = self.trial(name)
            self._timed(trial)
            del self.running[name]
            if trial["status"] == RUNNING:
                trial |= {"status": INTERRUPTED, "reason": f"{why}; it goes on when started again"}
                self.tell(f"{name} {_outcome(trial, '')}")
        self.record.keep()

    def tried(self) -> list[Tried]:
        """For the search: what came of every trial so far."""
        metric = self.record.values["metric"]
        return [
            Tried(t["number"], t["overrides"], t["metrics"].get(metric) if t["status"] == DONE else None)
            for t in self.record.trials
        ]

    def _propose(self) -> Trial:
        number = len(self.record.trials)
        point = self.search.propose(number, self.tried())
        trial = self.record.add(point, self.label(point))
        self._check(trial)
        return trial

    def _check(self, trial: Trial) -> None:
        """A trial whose recipe is wrong has failed before it starts."""
        try:
            parse(laid_over(self.base, trial["overrides"]))
        except RecipeError as err:
            trial |= {"status": FAILED, "reason": one_line(err)}
            self.tell(f"{trial['name']} {_outcome(trial, '')}")

    def _is_to_do(self, trial: Trial) -> bool:
        if trial["number"] >= self.search.num_trials:  # an earlier command's, which wanted more
            return False
        return trial["status"] in (WAITING, INTERRUPTED) and trial["name"] not in self.running

    def _chain(self, trial: Trial) -> tuple[str, ...]:
        name = trial["name"]
        if name not in self.chains:
            self.chains[name] = chain(parse(laid_over(self.base, trial["overrides"])))
        return self.chains[name]

    def _links_made(self, trial: Trial) -> tuple[str, ...]:
        """The links of a running trial's chain that are in the store."""
        stages = [
            s for s in ("proxy_llm", "blind", "proxy_mllm", "blind_instruct", "instruct") if s in trial["artifacts"]
        ]
        links = dict(zip(stages, self._chain(trial), strict=False))
        return tuple(link for stage, link in links.items() if self.record.is_made(trial["artifacts"][stage]))

    def _timed(self, trial: Trial) -> None:
        name = trial["name"]
        if name in self.running:
            trial["wall_time_s"] = round(self.before_s[name] + time.monotonic() - self.running[name], 3)


def _outcome(trial: Trial, metric: str) -> str:
    if trial["status"] == DONE:
        value = trial["metrics"].get(metric)
        return "done" if value is None else f"done: {metric} {value:.4g}"
    return f"{trial['status']}: {trial['reason']}"
