"""How trials get run: Ray Tune over a driver function for each, as many at once as the cluster has room for."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.autoscaler.sdk import request_resources
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from dpa_ray.engine import launch
from dpa_ray.engine.placing import Resources, place, worker_resources
from dpa_ray.engine.relaunching import here
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.sweep.record import one_line
from dpa_ray.sweep.sharing import Claims
from dpa_ray.sweep.space import AshaSection
from dpa_ray.sweep.state import Sweep
from dpa_ray.sweep.trial import run_trial

DRIVER_CPUS = 0.1
DATA_CPUS = 1.0
"""Beside its workers a trial needs a driver, which hardly computes, and room for one data task."""

MAX_T = 10**12
"""ASHA's last rung: beyond any number of steps."""

ASK_AGAIN_S = 10.0
"""How often nodes for all trials are asked for: there is one request for a cluster, and Ray Train's controllers make it anew
every 20 s, for the trials that run."""

_log = logging.getLogger(__name__)

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and the trackers have all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a result has the numbers of the stage under way only
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class _NotPickled:
    """Tune pickles what it is given, to restore from it. A sweep goes on from sweep.json, and there is nothing to keep."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Proposals(_NotPickled, Searcher):
    """Tune's way to ask a Sweep."""

    def __init__(self, sweep: Sweep):
        super().__init__()
        self.sweep = sweep

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        del trial_id
        if self.sweep.is_over or self.sweep.record.taken.is_set():
            return str(Searcher.FINISHED)
        trial = self.sweep.next()
        return trial and {"trial": trial["name"], "overrides": json.dumps(trial["overrides"])}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The callback is told the same."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _Events(_NotPickled, tune.Callback):
    """Tune's way to tell a Sweep."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.sweep.saw(trial.config["trial"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.sweep.ended(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trace = (trial.get_error() or "its driver was lost").strip().splitlines()
        self.sweep.ended(trial.config["trial"], one_line(RuntimeError(trace[-1])))


class _Budget(_NotPickled, Stopper):
    """Stops all trials when the time is over, or another process goes on with the sweep."""

    def __init__(self, sweep: Sweep, time_budget_s: float | None):
        self.sweep = sweep
        self.deadline = None if time_budget_s is None else time.monotonic() + time_budget_s

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.sweep.budget_is_over = True
        return self.sweep.budget_is_over or self.sweep.record.taken.is_set()


def needed_cpus(cluster: ClusterSection) -> float:
    """Logical CPUs of one trial: its driver, its workers, a data task."""
    return DRIVER_CPUS + cluster.max_workers * cluster.cpus_per_worker + DATA_CPUS


def room(cluster: ClusterSection, nodes: Sequence[Resources], at_most: int) -> int:
    """How many trials fit on `nodes` at once, each worker whole on one; one at least, which then waits, or says what is
    missing."""
    free = [dict(node) for node in nodes]
    fits = 0
    while fits < at_most and _take(free, cluster):
        fits += 1
    return max(1, fits)


def _take(free: list[dict[str, float]], cluster: ClusterSection) -> bool:
    """Take one trial's resources from what is `free` on each node. Does it fit?"""
    # `free` has the labels that are asked for
    placed = place(free, cluster.model_copy(update={"label_selector": {}}), tasks_per_worker=1)
    if placed.num_placed < cluster.max_workers:
        return False
    for node, num_workers in zip(free, placed.workers_by_node, strict=True):
        for name, amount in worker_resources(cluster).items():
            node[name] = node.get(name, 0.0) - num_workers * amount
    for cpus in (DATA_CPUS, DRIVER_CPUS):
        node = max(free, key=lambda node: node.get("CPU", 0.0))
        if node.get("CPU", 0.0) + 1e-6 < cpus:
            return False
        node["CPU"] -= cpus
    return True


@contextmanager
def nodes_asked_for(cluster: ClusterSection, num_trials: int) -> Iterator[None]:
    """Has an autoscaler bring nodes for so many trials at once: a trial is offered when there is room for it, and so would
    never ask for a second one's nodes itself."""
    if num_trials <= 1 or not launch.has_autoscaler():
        yield
        return
    num = num_trials * cluster.max_workers
    labels = [dict(cluster.label_selector)] * num if cluster.label_selector else None

    def ask() -> None:
        request_resources(bundles=[worker_resources(cluster)] * num, bundle_label_selectors=labels)

    def ask_again() -> None:
        while not ended.wait(ASK_AGAIN_S):
            try:
                ask()
            except Exception:  # Ray's head is away for a moment, or for good, which others tell
                _log.debug("nodes were not asked for again", exc_info=True)

    ask()
    ended = threading.Event()
    again = threading.Thread(target=ask_again, name="nodes", daemon=True)
    again.start()
    try:
        yield
    finally:
        ended.set()
        again.join()
        request_resources(bundles=[])


def connect(cluster: ClusterSection, max_concurrent: int | None) -> str:
    """Join or start Ray with room for the trials; a local one has as many at once as real CPUs, if nobody says more."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    at_once = max_concurrent or default_at_once(cluster)
    return launch.connect(cluster, num_cpus=at_once * needed_cpus(cluster), dashboard=True)


def default_at_once(cluster: ClusterSection) -> int:
    """Trials at once on this machine: one for each group of workers that has a core for each and one for its data."""
    return max(1, (os.cpu_count() or 1) // (cluster.max_workers + 1))


def start_claims() -> Any:
    """The actor that says who makes what."""
    return ray.remote(num_cpus=0)(Claims).options(scheduling_strategy=here()).remote()


def carry_out(
    sweep: Sweep,
    claims: Any,
    *,
    max_failures: int,
    asha: AshaSection | None,
    asha_mode: str,
    time_budget_s: float | None,
) -> None:
    """Run the sweep's trials until all are over, or time is."""
    scheduler = None
    if asha is not None:
        scheduler = AsyncHyperBandScheduler(
            time_attr="step", metric=asha.metric, mode=asha_mode, max_t=MAX_T, stop_last_trials=False,
            grace_period=asha.grace_steps, reduction_factor=asha.reduction_factor,
        )  # fmt: skip
    trainable = tune.with_parameters(run_trial, base=sweep.base, sweep=sweep.record.name, claims=claims)
    with tempfile.TemporaryDirectory(prefix="dpa_ray-tune-") as folder, _ray_until_the_end():
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(sweep), scheduler=scheduler, num_samples=-1, reuse_actors=False,
                trial_name_creator=_name, trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, stop=_Budget(sweep, time_budget_s), callbacks=[_Events(sweep)],
                failure_config=tune.FailureConfig(max_failures=max_failures), verbose=0,
            ),
        )  # fmt: skip
        tuner.fit()
    sweep.release = lambda name: None  # there is no Ray any more
    sweep.cut()


@contextmanager
def _ray_until_the_end() -> Iterator[None]:
    """Leave Ray at the end of the block, which ends whatever of a trial is left: before anybody else may go on with it."""
    try:
        yield
    finally:
        ray.shutdown()


def _name(trial: Any) -> str:
    return str(trial.config["trial"])
