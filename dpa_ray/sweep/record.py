"""<store>/sweeps/<name>/sweep.json: what a sweep is, how far it is, and what sharing saved.

    name status search metric mode seed digest device started wall_time_s recipe space left_out best error
    trials   a list, by number: number, name (its run: <store>/runs/<name>), overrides, status, metrics, reason, artifacts
             (stage -> path), at ([stage, step] told last), wall_time_s, unfinished_s, and (of a comparison) variant and seed
    stages   stage -> asked, made, reused
    gpu_s    spent, naive (of CPU workers: worker seconds)
    commits  of models from the hub, by their names in recipes: what they stood at when the sweep began
    compare  of a comparison: what `dpa_ray.sweep.compare` makes of the trials

A trial's status: waiting, running, done, stopped (by ASHA), failed, or interrupted (it goes on when the sweep is started
again). A sweep's: running, done, failed (every trial did), or interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpa_ray.credentials import without_credentials
from dpa_ray.errors import LeaseTaken, UserError
from dpa_ray.recipe import NAME_PATTERN, Recipe, RecipeError
from dpa_ray.stages.runs import RUN_FILE, identity
from dpa_ray.store.artifacts import find
from dpa_ray.store.fs import Store
from dpa_ray.sweep.space import Point

FILE = "sweep.json"
FINISHED = ("done", "stopped")
STAGES = ("proxy_llm", "proxy_merged", "blind", "proxy_mllm", "blind_instruct", "instruct", "eval")

MAX_REASON = 600

AWAY_S = 10.0
"""After a call that the store did not answer, trials are run for so long before it is asked again."""

_log = logging.getLogger(__name__)

Trial = dict[str, Any]


class Record:
    """sweep.json; every change is written at once, and as a whole, where the store answers."""

    def __init__(self, store: Store, name: str, recipe: Recipe, what: Mapping[str, Any]):
        """`what`: how the sweep searches (space, search, metric, mode, seed): the same name goes on with the same only."""
        if not re.fullmatch(NAME_PATTERN, name) or len(name) > 100:
            raise RecipeError([("--name", f"expected letters, digits, '.', '_' and '-', found {name!r}")], "sweep")
        self.store, self.name, self.path = store, name, f"sweeps/{name}"
        self.workers = recipe.cluster.max_workers
        self.gpus = recipe.cluster.gpus_per_worker or 1.0
        space = {key: value for key, value in what["space"].items() if key != "seeds"}  # further seeds only add trials
        content = json.dumps([identity(recipe), space, what["search"], what["seed"]], sort_keys=True)
        self.started, self.earlier_s = time.time(), 0.0
        self.taken = threading.Event()  # set where another process goes on with this sweep
        # asks the store that it is given; raises where another process may have taken the sweep over
        self.confirm: Callable[[Store], None] = lambda store: None
        self._brief = store.brief()
        self._away_until = 0.0  # by time.monotonic: the store did not answer
        self._metas: dict[str, dict[str, Any]] = {}
        self._never_made: set[str] = set()  # artifacts that trials that ended have left unmade
        self.values: dict[str, Any] = {
            "name": name, "status": "running", **what, "digest": hashlib.sha256(content.encode()).hexdigest()[:12],
            "device": "gpu" if recipe.cluster.gpus_per_worker else "cpu", "started": self.started, "wall_time_s": 0.0,
            "left_out": [], "best": None, "error": None, "trials": [], "stages": {}, "gpu_s": {"spent": 0.0, "naive": 0.0},
            "recipe": recipe.to_dict(), "commits": {},
        }  # fmt: skip

    @property
    def trials(self) -> list[Trial]:
        trials: list[Trial] = self.values["trials"]
        return trials

    @property
    def commits(self) -> dict[str, str]:
        commits: dict[str, str] = self.values["commits"]
        return commits

    def take_up(self) -> bool:
        """Go on from what an earlier attempt wrote, if there is something.

        Raises: RecipeError where the name is taken by a sweep of another recipe or space.
        """
        path = f"{self.path}/{FILE}"
        if not self.store.exists(path):
            return False
        try:
            old = self.store.read_json(path)
            digest, trials = old["digest"], [dict(trial) for trial in old["trials"]]
            started, self.earlier_s = float(old["started"]), float(old["wall_time_s"])
            numbers = [(trial["number"], trial["name"], trial["overrides"], trial["status"]) for trial in trials]
        except (UserError, KeyError, TypeError, ValueError):
            raise UserError(f"{self.store.url(path)}: expected a sweep.json of dpa_ray, found something else") from None
        if digest != self.values["digest"]:
            raise RecipeError(
                [("--name", f"the sweep {self.name} exists in this store with another recipe, space, search or seed: its "
                            f"digest is {digest}, this one's {self.values['digest']}. Choose another --name, or delete "
                            f"{self.store.url(self.path)} and its trials, {self.store.url(f'runs/{self.name}-*')}")],
                "sweep",
            )  # fmt: skip
        if [n for n, *_ in numbers] != list(range(len(trials))):
            raise UserError(f"{self.store.url(path)}: expected trials 0, 1, ... in order, found others")
        for trial in trials:
            if trial["status"] == "running":
                trial["status"] = "interrupted"
        self.values |= {"trials": trials, "started": started, "commits": dict(old.get("commits") or {})}
        return True

    def check_names(self, num_trials: int) -> None:
        """Raises: RecipeError where a new sweep's trials would have the names of runs that exist."""
        there = set(self.store.list_dirs("runs"))
        names = (f"{self.name}-{number:04}" for number in range(num_trials))
        taken = [name for name in names if name in there and self.store.exists(f"runs/{name}/{RUN_FILE}")]
        if taken:
            raise RecipeError(
                [("--name", f"expected no runs of this name, as the sweep {self.name} is new, found {len(taken)}, the first "
                            f"{taken[0]}. Choose another --name, or delete {self.store.url(f'runs/{self.name}-*')} (what "
                            "they made stays in artifacts, and is used again)")],
                "sweep",
            )  # fmt: skip

    def add(self, overrides: Point, label: Mapping[str, Any] | None = None) -> Trial:
        """A further trial, not started yet."""
        number = len(self.trials)
        trial = {
            "number": number, "name": f"{self.name}-{number:04}", "overrides": dict(overrides), **(label or {}),
            "status": "waiting", "metrics": {}, "reason": None, "artifacts": {}, "at": None,
            "wall_time_s": 0.0, "unfinished_s": 0.0,
        }  # fmt: skip
        self.trials.append(trial)
        return trial

    def keep(self) -> None:
        """Write what has changed, if that can be done now. What cannot be written is written with a later change or at the
        end: who runs the trials must neither wait for the store nor take its outage for a trial's failure."""
        if time.monotonic() < self._away_until:
            return
        try:
            self.write(store=self._brief)
        except (UserError, OSError) as err:
            self._away(err)

    def _away(self, err: Exception) -> None:
        if not self._away_until:
            _log.warning("%s is not written for now: %s", self.store.url(f"{self.path}/{FILE}"), err)
        self._away_until = time.monotonic() + AWAY_S

    def write(self, status: str | None = None, store: Store | None = None, **values: Any) -> None:
        """Set `status` and further keys, count anew, and write the whole (through `store`, where that is another one).

        Raises: LeaseTaken where it is another's now; UserError where it cannot be written.
        """
        store = store or self.store
        if self.taken.is_set():
            raise LeaseTaken(f"{self.store.url(self.path)}: another process has taken this sweep over")
        self.confirm(store)
        self.values |= values
        if status is not None:
            self.values["status"] = status
        self.values["wall_time_s"] = self.earlier_s + time.time() - self.started
        self.values["stages"], self.values["gpu_s"] = account(
            self.trials, self._look(store, anew=status is not None), workers=self.workers, gpus_per_worker=self.gpus
        )
        self.values["best"] = best(self.trials, self.values["metric"], self.values["mode"])
        store.write_json(f"{self.path}/{FILE}", self.values)
        self._away_until = 0.0

    def is_made(self, path: str) -> bool:
        """Is this artifact in the store, as far as that can be known now?"""
        if time.monotonic() < self._away_until:
            return path in self._metas
        try:
            return self._meta(self._brief, path) is not None
        except (UserError, OSError) as err:
            self._away(err)
            return False

    def _look(self, store: Store, *, anew: bool) -> Callable[[str], dict[str, Any] | None]:
        """meta of artifacts for an account. What trials have left unmade when they ended is not asked for each time again
        (unless `anew`), but where another trial makes it now: the store would be asked for hundreds at each step."""
        if anew:
            self._never_made.clear()
        under_way = {
            path for t in self.trials if t["status"] in ("waiting", "running") for path in t["artifacts"].values()
        }

        def meta(path: str) -> dict[str, Any] | None:
            if path in self._never_made and path not in under_way:
                return None
            found = self._meta(store, path)
            if found is None and path not in under_way:
                self._never_made.add(path)
            elif found is not None:
                self._never_made.discard(path)
            return found

        return meta

    def _meta(self, store: Store, path: str) -> dict[str, Any] | None:
        """meta of a committed artifact, which never changes, or None where there is none yet."""
        if path not in self._metas:
            stage, _, key = path.removeprefix("artifacts/").rpartition("-")
            artifact = find(store, stage, key)
            if artifact is None:
                return None
            self._metas[path] = artifact.manifest["meta"]
        return self._metas[path]


def commits_of(store: Store, name: str) -> dict[str, str]:
    """What models from the hub stand at in the sweep `name`, by their names in recipes."""
    path = f"sweeps/{name}/{FILE}"
    return dict(store.read_json(path).get("commits") or {}) if store.exists(path) else {}


def account(
    trials: Sequence[Trial],
    meta: Callable[[str], dict[str, Any] | None],
    *,
    workers: int,
    gpus_per_worker: float = 1.0,
) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """What was asked, made and reused, by stage, and what it cost.

    Asked: by how many trials. Made: by a trial of this sweep, in any attempt, as the artifact's manifest says. Reused: how
    often a trial found what another, or an earlier run, had made. `spent` is the time of what was made, and of stages that
    broke off, times the workers (and their GPUs); `naive` what the same trials would have spent if each had made its own.

    Args:
        meta: of an artifact by its path, or None where it is not there.
    """
    counts: dict[str, dict[str, int]] = {}
    spent = naive = 0.0
    for trial in trials:
        unfinished = trial["unfinished_s"] * workers * gpus_per_worker
        spent, naive = spent + unfinished, naive + unfinished
        for stage in sorted(trial["artifacts"], key=STAGES.index):
            path = trial["artifacts"][stage]
            count = counts.setdefault(stage, {"asked": 0, "made": 0, "reused": 0})
            count["asked"] += 1
            found = meta(path)
            if found is None:
                continue
            cost = found.get("wall_time_s", 0.0) * found.get("world_size", workers) * gpus_per_worker
            naive += cost
            if found.get("run") == f"runs/{trial['name']}":
                count["made"] += 1
                spent += cost
            else:
                count["reused"] += 1
    ordered = {stage: counts[stage] for stage in STAGES if stage in counts}
    return ordered, {"spent": round(spent, 3), "naive": round(naive, 3)}


def best(trials: Sequence[Trial], metric: str, mode: str) -> str | None:
    """The name of the finished trial that is best by `metric`; the first of several."""
    judged = [(trial["metrics"][metric], trial) for trial in trials
              if trial["status"] == "done" and trial["metrics"].get(metric) is not None]  # fmt: skip
    if not judged:
        return None
    sign = 1.0 if mode == "min" else -1.0
    name: str = min(judged, key=lambda pair: sign * pair[0])[1]["name"]
    return name


def one_line(err: BaseException) -> str:
    """Why a trial failed, without what addresses have of passwords."""
    if isinstance(err, RecipeError):
        text = "; ".join(f"{path}: {what}" if path else what for path, what in err.errors)
    else:
        text = " ".join(str(err).split()) or type(err).__name__
    text = without_credentials(text)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
