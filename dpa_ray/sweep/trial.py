"""One trial: the main job inside a Tune trial, its events told to the sweep's driver."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from dpa_ray.data.retry import bridging, retried
from dpa_ray.engine import job
from dpa_ray.eval.held_out import TIME
from dpa_ray.recipe import parse
from dpa_ray.report import metrics
from dpa_ray.stages.pipeline import Claim
from dpa_ray.stages.spec import Task
from dpa_ray.store.fs import Store
from dpa_ray.sweep.measures import Running, final
from dpa_ray.sweep.record import commits_of, one_line
from dpa_ray.sweep.sharing import claim
from dpa_ray.sweep.space import laid_over


class Watch:
    """What the sweep's driver is told of a trial's events: where it is, and numbers by name.

    `report` takes {"at": [stage, step], "unfinished_s"} with, now and then, "step" and numbers by their names; "artifacts"
    once, and at the end "final" or "failed".
    """

    def __init__(self, report: Callable[[dict[str, Any]], None]):
        self.report = report
        self.running: Running | None = None
        self.stage_s = 0.0

    def observe(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the run."""
        if kind == "planned":
            self.report({"artifacts": values["artifacts"]})
        elif kind == "stage_started":
            self.running = Running(values["stage"], values["num_steps"])  # also when it begins anew, after a failure
        elif kind == "step" and self.running is not None:
            self.running.add(values)
            self.stage_s += values["step_time_s"] + values.get(TIME, 0.0)
            if self.running.is_due(values["step"]):
                at = {"at": [values["stage"], values["step"]], "unfinished_s": self.stage_s}
                self.report({**at, "step": values["step"], **self.running.values()})
        elif kind in ("stage_finished", "blind_finished"):
            self.stage_s = 0.0
            self.report({"unfinished_s": 0.0})


def run_trial(config: dict[str, str], base: dict[str, Any], sweep: str, claims: Any) -> None:
    """What Tune runs for each trial.

    Args:
        config: `trial`, the run's name, and `overrides`, a point as JSON.
        base: the recipe that points are laid over.
        claims: actor handle of `sharing.Claims`.
    """
    import ray
    from ray import tune

    name = config["trial"]

    def claim_here(tasks: Sequence[Task], alone: Claim) -> int:
        return claim(tasks, alone, take=lambda paths: int(ray.get(claims.take.remote(name, paths))))

    try:
        watch = Watch(tune.report)
        recipe = parse(laid_over(base, json.loads(config["overrides"])) | {"name": name})
        with bridging(recipe.data.retry_s):
            commits = commits_of(Store(recipe.store, through=retried), sweep)
        done = job.run(recipe, job.Company(sweep, watch.observe, claim_here, commits))
        with bridging(recipe.data.retry_s):
            records = metrics.read(Store(recipe.store, through=retried), f"runs/{name}")
        tune.report({"final": final(records, done.get("eval") or {})})
    except Exception as err:
        tune.report({"failed": one_line(err)})
    finally:
        claims.release.remote(name)
