"""Does a person see what won, what failed and why, and what sharing saved?"""

from __future__ import annotations

import io
from typing import Any

import pytest

from dpa_ray.report.console import terminal
from dpa_ray.sweep import screen
from dpa_ray.sweep.compare import compared

METRIC = "eval.heldout.accuracy"


def trial(
    number: int, overrides: dict[str, Any], status: str, value: float | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "number": number, "name": f"s-{number:04}", "overrides": overrides, "status": status, "reason": None,
        "metrics": {} if value is None else {METRIC: value}, "wall_time_s": 12.0, **more,
    }  # fmt: skip


@pytest.fixture
def values() -> dict[str, Any]:
    return {
        "name": "s", "search": "grid", "metric": METRIC, "mode": "max", "device": "cpu", "best": "s-0001",
        "left_out": [{"cmo.lower": 0.6, "cmo.upper": 0.4}],
        "stages": {"proxy_llm": {"asked": 3, "made": 1, "reused": 2}}, "gpu_s": {"spent": 30.0, "naive": 120.0},
        "trials": [
            trial(0, {"cmo.upper": 0.4}, "done", 0.5), trial(1, {"cmo.upper": 0.6}, "done", 0.75),
            trial(2, {"cmo.upper": 0.8}, "failed", reason="stage instruct, step 3: the loss is not finite"),
        ],
    }  # fmt: skip


def shown(values: dict[str, Any], width: int = 160) -> str:
    text = io.StringIO()
    console = terminal(text, width)
    screen.header(values, "/store/sweeps/s/sweep.json", console)
    screen.closing(values, "/store/sweeps/s/sweep.json", console)
    return text.getvalue()


def test_trials_stand_in_order_with_reasons_and_what_was_saved(values: dict[str, Any]) -> None:
    text = shown(values)
    rows = [line.split()[:3] for line in text.splitlines() if line[:4].isdigit()]
    assert rows == [["0001", "0.6", "0.7500"], ["0000", "0.4", "0.5000"], ["0002", "0.8", "-"]], "the best first"
    assert "s-0002 failed: stage instruct, step 3: the loss is not finite" in text
    assert "worker seconds in stages: 30 spent, 120 if each trial had made its own, 75 % saved" in text
    assert "1 of the combinations, the first cmo.lower=0.6 cmo.upper=0.4" in text
    assert "2 done, 1 failed" in text
    assert "best: s-0001" in text


def test_paths_and_reasons_are_not_cut_where_the_screen_is_narrow(values: dict[str, Any]) -> None:
    text = shown(values, width=40)
    assert "/store/sweeps/s/sweep.json" in text
    assert "s-0002 failed: stage instruct, step 3: the loss is not finite" in text


def test_a_metric_that_no_trial_told_is_named_with_those_that_were(values: dict[str, Any]) -> None:
    values["metric"] = "eval.heldout.f1"
    assert f"no trial told eval.heldout.f1; told were {METRIC}" in shown(values)


def test_a_comparison_says_where_nothing_is_shown(values: dict[str, Any]) -> None:
    numbers = {"vanilla": [0.5, 0.6, 0.7], "pmo": [0.52, 0.57, 0.73], "dpa": [0.6, 0.7, 0.8]}
    values["trials"] = [
        trial(n, {"seed": seed}, "done", value, variant=name, seed=seed)
        for n, (name, seed, value) in enumerate((k, s, v) for k, vs in numbers.items() for s, v in enumerate(vs))
    ]
    values["compare"] = compared(values["trials"], [METRIC])
    lines = {line.split()[0]: line for line in shown(values).splitlines() if line.strip()}
    assert lines["pmo"].endswith("no difference shown")
    assert "0.6067" in lines["pmo"]
    assert "+0.1000" in lines["dpa"]
    assert lines["dpa"].rstrip().endswith("higher")
    assert "not corrected for their number" in shown(values)
