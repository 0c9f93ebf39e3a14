"""What does a run show to Prometheus? Its steps, stages, faults and goodput, by the metrics port of the driver's Ray node."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpa_ray.engine.messages import FAILED
from dpa_ray.report.goodput import PARTS

PREFIX = "ray_"
"""Ray's own, before the name of every metric."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One time series for each combination of its labels."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ("run", "stage")
    key: str = ""  # of a step's metrics (metrics.jsonl), where it is one of them as it is

    @property
    def exported(self) -> str:
        """As Prometheus finds it."""
        return f"{PREFIX}{self.name}"


STEP = (
    Metric("dpa_step", "gauge", "Optimizer steps done in the stage", key="step"),
    Metric("dpa_epoch", "gauge", "Epoch of the last step, from 0", key="epoch"),
    Metric("dpa_step_time_seconds", "gauge", "Duration of the last step, waiting for data included", key="step_time_s"),
    Metric("dpa_data_wait_seconds", "gauge", "Time in the last step that it waited for its batches", key="data_wait_s"),
    Metric("dpa_tokens_per_second", "gauge", "Tokens of the last step, image tokens included", key="tokens_per_s"),
    Metric("dpa_loss", "gauge", "Optimised loss of the last step", key="loss"),
    Metric("dpa_nll_mean", "gauge", "Mean negative log-likelihood over the targets of the last step", key="nll_mean"),
    Metric("dpa_weight_mean", "gauge", "Mean weight of the targets of the last step (CMO)", key="weight_mean"),
    Metric("dpa_grad_norm", "gauge", "Gradient norm of the last step, before clipping", key="grad_norm"),
    Metric("dpa_learning_rate", "gauge", "Learning rate of the last step", key="lr"),
)
SAMPLES_PER_SECOND = Metric("dpa_samples_per_second", "gauge", "Samples of the last step")
NUM_STEPS = Metric("dpa_num_steps", "gauge", "Optimizer steps that the stage has in all")
UNDER_WAY = Metric("dpa_stage_under_way", "gauge", "1 for the stage under way, 0 for those before it")
SAMPLES = Metric("dpa_samples_total", "counter", "Samples passed by this job, those of steps made again included")
TOKENS = Metric("dpa_tokens_total", "counter", "Tokens passed by this job, those of steps made again included")
CHECKPOINTS = Metric("dpa_checkpoints_total", "counter", "Checkpoints written by this job")
FAULTS = Metric(
    "dpa_faults_total", "counter", "How often this job's workers were replaced, by why", ("run", "stage", "why")
)
GOODPUT = Metric(
    "dpa_goodput_ratio", "gauge", "Time spent on new steps / wall time, over all attempts at the run", ("run",)
)
SPENT = Metric("dpa_spent_seconds", "gauge", "Wall time by what it was spent on, over all attempts", ("run", "part"))

METRICS = (
    *STEP, SAMPLES_PER_SECOND, NUM_STEPS, UNDER_WAY, SAMPLES, TOKENS, CHECKPOINTS, FAULTS, GOODPUT, SPENT,
)  # fmt: skip


class Exporter:
    """Sets a run's metrics as its events come. Needs a process that has joined Ray.

    What goes wrong here is told once and ends the export, not the run.
    """

    def __init__(self, run: str):
        from ray.util import metrics

        kinds = {"gauge": metrics.Gauge, "counter": metrics.Counter}
        self.run, self.stage = run, ""
        self.metrics: dict[str, Any] = {
            m.name: kinds[m.kind](m.name, description=m.help, tag_keys=m.labels) for m in METRICS
        }

    def saw(self, kind: str, values: Mapping[str, Any], goodput: Mapping[str, Any]) -> None:
        """One event of the run; `goodput`: the ledger's entries now."""
        if not self.metrics:
            return
        try:
            self._saw(kind, values)
            if kind in ("step", "saved", "task_finished", FAILED):
                self._goodput(goodput)
        except Exception as err:  # Ray's, of any type
            self.metrics = {}
            _log.warning("no more metrics for Prometheus: %s", (str(err).splitlines() or [type(err).__name__])[0])

    def _saw(self, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "task_started":
            if self.stage:
                self._set(UNDER_WAY, 0)
            self.stage = values["stage"]
            self._set(UNDER_WAY, 1)
        elif kind == "task_finished":
            self._set(UNDER_WAY, 0)
            self.stage = ""
        elif kind == "stage_started":
            self._set(NUM_STEPS, values["num_steps"])
        elif kind == "step":
            for metric in STEP:
                self._set(metric, values.get(metric.key))
            if values["step_time_s"]:
                self._set(SAMPLES_PER_SECOND, values["num_samples"] / values["step_time_s"])
            self._count(SAMPLES, values["num_samples"])
            self._count(TOKENS, values["num_tokens"])
        elif kind == "saved":
            self._count(CHECKPOINTS, 1)
        elif kind == FAILED:
            self._count(FAULTS, 1, why=values["why"])

    def _goodput(self, entries: Mapping[str, Any]) -> None:
        self._set(GOODPUT, entries["goodput"])
        for part in PARTS:
            self._set(SPENT, entries[f"{part}_s"], part=part)

    def _set(self, metric: Metric, value: float | None, **labels: str) -> None:
        """What is not finite is left as it was: Prometheus's own rules for it surprise."""
        if value is not None and math.isfinite(value):
            self.metrics[metric.name].set(value, tags=self._labels(metric, labels))

    def _count(self, metric: Metric, number: int, **labels: str) -> None:
        if number > 0:  # Ray takes no other
            self.metrics[metric.name].inc(number, tags=self._labels(metric, labels))

    def _labels(self, metric: Metric, more: dict[str, str]) -> dict[str, str]:
        own = {"run": self.run, "stage": self.stage}
        return {name: value for name, value in (own | more).items() if name in metric.labels}
