"""Are the metrics that a run exports those that the dashboard asks for?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.engine.messages import FAILED
from dpa_ray.engine.prometheus import METRICS, Exporter
from dpa_ray.report.goodput import Ledger

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "dpa_ray.json"
METRIC_NAME = re.compile(r"\bray_dpa_\w+")


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def test_the_dashboard_asks_for_exactly_the_metrics_that_there_are() -> None:
    asked = {name for query in queries(json.loads(DASHBOARD.read_text())) for name in METRIC_NAME.findall(query)}
    assert asked == {metric.exported for metric in METRICS}


def test_the_dashboard_groups_by_labels_that_the_metrics_have() -> None:
    labels = {metric.exported: set(metric.labels) for metric in METRICS}
    for query in queries(json.loads(DASHBOARD.read_text())):
        (*names,) = METRIC_NAME.findall(query)
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        for name in names:
            assert grouped <= labels[name], query
            assert "run" in labels[name]


def test_panels_have_numbers_of_their_own() -> None:
    numbers = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(numbers) == len(set(numbers))


class Recorded:
    """Stands for one metric of Ray's: keeps what is set."""

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(sorted(tags.items()))] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # as Ray demands
        key = tuple(sorted(tags.items()))
        self.values[key] = self.values.get(key, 0) + value


@pytest.fixture
def exporter() -> Exporter:
    """Without Ray: what it sets is kept beside it (a scrape of the real thing is in tests/integration/test_submit.py)."""
    made = Exporter.__new__(Exporter)
    made.run, made.stage = "a-run", ""
    made.metrics = {metric.name: Recorded() for metric in METRICS}
    return made


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "stage": "instruct", "step": number, "epoch": 0, "num_samples": 8, "num_tokens": 400, "step_time_s": 2.0,
        "data_wait_s": 0.5, "tokens_per_s": 200.0, "loss": 1.5, "nll_mean": 1.25, "weight_mean": 0.3, "grad_norm": 0.7,
        "lr": 1e-4, **values,
    }  # fmt: skip


def test_events_become_values_with_run_and_stage(exporter: Exporter) -> None:
    ledger = Ledger(0.0)
    for kind, values in [
        ("task_started", {"stage": "instruct", "trains": True}),
        ("stage_started", {"stage": "instruct", "num_steps": 4}),
        ("step", step(1)),
        ("step", step(2, loss=float("nan"))),
        ("saved", {"stage": "instruct", "step": 2}),
        (FAILED, {"why": "preemption"}),
        ("note", {"text": "of no number"}),
        ("task_finished", {"stage": "instruct"}),
    ]:
        exporter.saw(kind, values, ledger.entries(10.0))
    stage = (("run", "a-run"), ("stage", "instruct"))
    got = {name: dict(metric.values) for name, metric in exporter.metrics.items()}
    assert got["dpa_step"] == {stage: 2}
    assert got["dpa_num_steps"] == {stage: 4}
    assert got["dpa_samples_per_second"] == {stage: 4.0}
    assert got["dpa_samples_total"] == {stage: 16}
    assert got["dpa_loss"] == {stage: 1.5}, "what is not finite is not shown"
    assert got["dpa_checkpoints_total"] == {stage: 1}
    assert got["dpa_faults_total"] == {(*stage, ("why", "preemption")): 1}
    assert got["dpa_stage_under_way"] == {stage: 0}
    assert got["dpa_spent_seconds"][(("part", "preparing"), ("run", "a-run"))] == 10.0


def test_an_error_of_rays_ends_the_export_and_nothing_else(
    exporter: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    del exporter.metrics["dpa_stage_under_way"]
    for _ in range(2):
        exporter.saw("task_started", {"stage": "instruct", "trains": True}, {})
    assert caplog.text.count("no more metrics for Prometheus") == 1
