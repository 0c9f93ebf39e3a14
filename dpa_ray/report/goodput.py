"""Where did a run's wall time go? A ledger of its workers' events, over all attempts at the run.

Every moment between two events belongs to one part, so that the parts always add up to the wall time. Steps whose number
was reached before are made again: they, and all that lies between a failure and the first step that is new, are lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpa_ray.report.timeline import ATTEMPT, RESTART, SAVED, Span, Timeline

TRAINING, DATA, SAVING, STARTING, LOST, TASKS, PREPARING, OTHER = PARTS = (
    "training",  # steps that were made for the first time
    "data_wait",  # of these steps, the time in which they waited for their batches
    "saving",  # training stood for a checkpoint, or its result was gathered, saved and committed
    "starting",  # Ray, workers, models, engines
    "lost",  # to failures and to workers that came or went: steps made again, and the way back to new ones
    "tasks",  # merging, q, evaluation
    "preparing",  # data and models, before anything is handed to workers
    "other",
)

LAUNCHED = "launched"
"""The event that the driver hands its tasks to workers."""

WAITING, CLAIMED = "waiting", "claimed"
"""The events that the driver asks whether another job makes what is next, and has its answer. What lies between is of the
part that it would be anyway; where it takes LEAST_WAIT_S, the timeline says what it was."""

LEAST_WAIT_S = 1.0

OUTSIDE = ""
"""Stands for the stage of what belongs to none."""


class Ledger:
    """Fed with events in the order of their times; see `entries`."""

    def __init__(self, now_s: float, before: Mapping[str, Any] | None = None):
        """`now_s`: when this attempt began; `before`: the `entries` of earlier attempts at the same run."""
        before = before or {}
        self.mark_s = now_s
        self.num_attempts = int(before.get("num_attempts", 0)) + 1
        self.num_restarts = int(before.get("num_restarts", 0))
        self.reached: dict[str, int] = {stage: int(step) for stage, step in before.get("reached", {}).items()}
        self.spent: dict[str, dict[str, float]] = {}
        for stage, parts in [(OUTSIDE, before.get("outside_stages", {})), *before.get("stages", {}).items()]:
            self.spent[stage] = {part: float(parts.get(f"{part}_s", 0.0)) for part in PARTS}
        self.stage = OUTSIDE
        self.waits_as = PREPARING  # what time is until something else is known of it
        self.recovering = False
        self.asks = False  # whether another job makes what is next
        self.timeline = Timeline(before.get("timeline"), apart=(LOST,))
        self.timeline.happened(now_s, ATTEMPT, OUTSIDE)
        self.saving_s: float | None = None  # as the last step told it; None: no step of these workers yet

    def saw(self, kind: str, values: Mapping[str, Any], now_s: float) -> None:
        """One event; those that say nothing about time change nothing."""
        if kind == "step":
            self._step(values, now_s)
        elif kind == "failed":
            self._close(LOST, now_s)
            self.timeline.happened(now_s, RESTART, self.stage)
            self.num_restarts += 1
            self.recovering = True
        elif kind == "saved":
            self.timeline.happened(now_s, SAVED, values["stage"], values["step"])
        elif kind in (WAITING, CLAIMED):
            self._close(self.waits_as, now_s)
            self.asks = kind == WAITING
        elif kind == LAUNCHED:
            self._close(self.waits_as, now_s)
            self.waits_as = STARTING
        elif kind == "workers_started":
            self._close(self.waits_as, now_s)
        elif kind == "task_started":
            self._close(self.waits_as, now_s)
            self.stage, self.saving_s = values["stage"], None
            self.waits_as = STARTING if values["trains"] else TASKS
            if not values["trains"]:
                self.recovering = False
        elif kind == "blind_shard":
            self._close(TASKS, now_s)
        elif kind == "task_finished":
            self._close(TASKS if self.waits_as == TASKS else SAVING, now_s)
            self.stage, self.waits_as, self.recovering = OUTSIDE, STARTING, False

    def ended(self, now_s: float) -> None:
        """This attempt is over; what came after its last event is `other`."""
        self.stage, self.waits_as, self.recovering, self.asks = OUTSIDE, OTHER, False, False
        self._close(OTHER, now_s)

    def entries(self, now_s: float) -> dict[str, Any]:
        """What run.json keeps: seconds by part, in all, by stage and outside of any; they add up to `wall_time_s`.

        `goodput` is training / wall time; `reached` the highest step of each stage that was ever made; `num_attempts` counts
        jobs, `num_restarts` how often one replaced its workers; `timeline` says when all that was. Time since the last event
        counts as what is going on.
        """
        spent = {stage: dict(parts) for stage, parts in self.spent.items()}
        under_way = spent.setdefault(self.stage, dict.fromkeys(PARTS, 0.0))
        part = LOST if self.recovering else self.waits_as
        under_way[part] += max(0.0, now_s - self.mark_s)
        now = Span(self.stage, self._shown(part, now_s), self.mark_s, now_s - self.mark_s)
        totals = {part: sum(parts[part] for parts in spent.values()) for part in PARTS}
        wall_time_s = sum(totals.values())
        outside = spent.pop(OUTSIDE, dict.fromkeys(PARTS, 0.0))
        return {
            "goodput": totals[TRAINING] / wall_time_s if wall_time_s else 0.0,
            "wall_time_s": wall_time_s, **_named(totals), "num_attempts": self.num_attempts,
            "num_restarts": self.num_restarts,
            "stages": {stage: _named(parts) for stage, parts in spent.items()}, "outside_stages": _named(outside),
            "reached": self.reached, "timeline": self.timeline.entries(now),
        }  # fmt: skip

    def _step(self, values: Mapping[str, Any], now_s: float) -> None:
        """A step is made: its own time, what training stood for a checkpoint before it and for an evaluation behind it,
        and what is left."""
        stage, step = values["stage"], int(values["step"])
        is_new = step > self.reached.get(stage, 0)
        if is_new:
            self.reached[stage] = step
        self.stage = stage
        first, told_s = self.saving_s is None, float(values.get("saving_s", 0.0))
        saving_s = 0.0 if self.saving_s is None else max(0.0, told_s - self.saving_s)
        self.saving_s, self.waits_as = told_s, OTHER
        if not is_new and self.recovering:
            self._close(LOST, now_s)
            return
        way_back, self.recovering = self.recovering, False
        waited_s = float(values["data_wait_s"])
        training_s, evaluating_s = float(values["step_time_s"]) - waited_s, float(values.get("eval_time_s", 0.0))
        parts = ((DATA, waited_s), (TRAINING, training_s), (SAVING, saving_s), (TASKS, evaluating_s))
        taken_s, left_s = {}, max(0.0, now_s - self.mark_s)
        for part, time_s in parts:
            taken_s[part] = min(max(0.0, time_s), left_s)
            left_s -= taken_s[part]
        self._close(LOST if way_back else STARTING if first else OTHER, self.mark_s + left_s)
        for part in (SAVING, DATA, TRAINING, TASKS):  # as they followed each other
            self._close(part if is_new else LOST, self.mark_s + taken_s[part])
        self.mark_s = max(self.mark_s, now_s)

    def _close(self, part: str, now_s: float) -> None:
        """The time from the last mark until now was `part`; on the way back from a failure it is lost, whatever it was."""
        parts = self.spent.setdefault(self.stage, dict.fromkeys(PARTS, 0.0))
        part = LOST if self.recovering else part
        parts[part] += max(0.0, now_s - self.mark_s)
        self.timeline.add(self.stage, self._shown(part, now_s), self.mark_s, now_s)
        self.mark_s = max(self.mark_s, now_s)

    def _shown(self, part: str, now_s: float) -> str:
        """What the timeline calls the time from the last mark until now, which was `part`."""
        return WAITING if self.asks and now_s - self.mark_s >= LEAST_WAIT_S else part


def _named(parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}_s": parts[part] for part in PARTS}
