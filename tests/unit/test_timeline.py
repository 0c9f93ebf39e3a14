"""Does a run's timeline say when what happened, over all attempts, and stay small however long it runs?"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from dpa_ray.report.goodput import CLAIMED, LAUNCHED, PARTS, WAITING, Ledger
from dpa_ray.report.timeline import MOST_EVENTS, MOST_SPANS, Span, Timeline, together
from dpa_ray.report.timeline_figure import timeline_figure
from tests.report_data import run_data


class Clock:
    """A ledger whose events come some seconds after each other."""

    def __init__(self, start_s: float = 1000.0, before: dict[str, Any] | None = None):
        self.now_s = start_s
        self.ledger = Ledger(start_s, before)

    def after(self, time_s: float, kind: str, **values: Any) -> None:
        self.now_s += time_s
        self.ledger.saw(kind, values, self.now_s)

    def step(self, step: int, time_s: float = 4.0, data_wait_s: float = 1.0) -> None:
        self.after(
            time_s, "step", stage="instruct", step=step, step_time_s=time_s, data_wait_s=data_wait_s, saving_s=0.0
        )

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(json.dumps(self.ledger.entries(self.now_s)))["timeline"]
        return told

    def spans(self) -> list[tuple[str, str, float]]:
        return [(stage, kind, round(length_s, 3)) for stage, kind, _, length_s in self.told()["spans"]]


def test_spans_are_the_ledgers_parts_in_their_order() -> None:
    run = Clock()
    run.after(10, WAITING)
    run.after(0.2, CLAIMED)
    run.after(1, LAUNCHED)
    run.after(20, "task_started", stage="instruct", trains=True)
    run.step(1)
    run.step(2, data_wait_s=0.0)
    run.after(0, "saved", stage="instruct", step=2)
    run.after(3, "failed")
    run.after(9, "workers_started")
    assert run.spans() == [
        ("", "preparing", 11.2), ("", "starting", 20), ("instruct", "data_wait", 1), ("instruct", "training", 7),
        ("instruct", "lost", 12),
    ]  # fmt: skip
    assert run.told()["events"] == [
        [1000, "attempt", "", None], [1039.2, "saved", "instruct", 2], [1042.2, "restart", "instruct", None],
    ]  # fmt: skip


def test_a_wait_for_another_job_is_told_and_is_of_the_same_part() -> None:
    run = Clock()
    run.after(10, WAITING)
    run.after(50, CLAIMED)
    run.after(1, LAUNCHED)
    assert run.spans() == [("", "preparing", 10), ("", "waiting", 50), ("", "preparing", 1)]
    assert run.ledger.entries(run.now_s)["preparing_s"] == 61


def test_a_second_attempt_adds_to_what_the_first_had_told() -> None:
    first = Clock()
    first.after(10, LAUNCHED)
    kept = json.loads(json.dumps(first.ledger.entries(first.now_s + 2)))
    second = Clock(5000.0, kept)
    second.after(7, LAUNCHED)
    assert second.told()["spans"] == [
        ["", "preparing", 1000, 10], ["", "starting", 1010, 2], ["", "preparing", 5000, 7],
    ]  # fmt: skip
    assert [event[:2] for event in second.told()["events"]] == [[1000, "attempt"], [5000, "attempt"]]


@pytest.mark.parametrize("seed", range(5))
def test_it_stays_small_and_loses_no_time_and_no_failure(seed: int) -> None:
    draw = random.Random(seed)
    made = Timeline(apart=("lost",))
    at_s = start_s = 1.7e9
    spent = dict.fromkeys(PARTS, 0.0)
    lost = []
    for number in range(20_000):
        length_s = draw.expovariate(1.0)
        kind = "lost" if number % 2000 == 1999 else draw.choice(["training", "training", "data_wait", "saving"])
        made.add("instruct" if number > 7000 else "proxy_mllm", kind, at_s, at_s + length_s)
        if number % 20 == 0:
            made.happened(at_s, "restart" if kind == "lost" else "saved", "instruct", number)
        lost += [length_s] if kind == "lost" else []
        spent[kind] += length_s
        at_s += length_s
    told = made.entries()
    assert len(told["spans"]) <= 2 * MOST_SPANS
    assert len(told["events"]) <= MOST_EVENTS
    assert len(json.dumps(told)) < 60_000
    assert sum(length_s for *_, length_s in told["spans"]) == pytest.approx(at_s - start_s, rel=1e-4)
    assert [length_s for _, kind, _, length_s in told["spans"] if kind == "lost"] == pytest.approx(lost, abs=0.02)
    ends = [(start, start + length) for _, _, start, length in told["spans"]]
    assert all(end == pytest.approx(start, abs=0.03) for (_, end), (start, _) in zip(ends, ends[1:], strict=False))


def test_short_spans_are_what_most_of_their_time_was() -> None:
    kinds = [
        ("data_wait", 0.1),
        ("training", 0.4),
        ("data_wait", 0.1),
        ("training", 0.5),
        ("saving", 5.0),
        ("lost", 0.1),
    ]
    spans, at_s = [], 0.0
    for kind, length_s in kinds:
        spans.append(Span("a", kind, at_s, length_s))
        at_s += length_s
    found = together(spans, 1.0, apart=("lost",))
    assert [(s.kind, round(s.length_s, 3)) for s in found] == [("training", 1.1), ("saving", 5.0), ("lost", 0.1)]
    gap = [Span("a", "training", 0, 0.125), Span("a", "training", 90, 0.125), Span("b", "training", 90.125, 0.125)]
    assert together(gap, 1.0) == gap, "neither over a gap nor from one stage into another"


def test_the_figure_leaves_out_the_time_between_attempts() -> None:
    figure = timeline_figure(run_data())
    assert figure is not None
    bars = figure.spec["layer"][0]["data"]["values"]
    assert max(bar["x2"] for bar in bars) == 130
    assert [bar["kind"] for bar in bars][-1] == "merging, q, eval"
    assert figure.columns == ("at, s", "for, s", "stage", "what")
    assert (55.0, 12.0, "proxy_mllm", "lost to failures") in figure.rows
    assert (55.0, None, "proxy_mllm", "workers replaced") in figure.rows
    assert (70.0, None, "outside of stages", "attempt 2 begins") in figure.rows
    assert (70.0, None, "proxy_llm", "reused") in figure.rows
    assert (100.0, None, "instruct", "saved, step 60") in figure.rows
    assert "the time between them is left out" in figure.note
    assert figure.rows == sorted(figure.rows, key=lambda row: row[0])


@pytest.mark.parametrize(
    "told", [None, {}, {"spans": 3}, {"spans": [[1], "x", ["a", "b", None, 2]], "events": [["x"]]}]
)
def test_what_is_no_timeline_gives_no_figure(told: Any) -> None:
    run = run_data()
    assert timeline_figure(replace(run, info={**run.info, "goodput": {"timeline": told}})) is None
