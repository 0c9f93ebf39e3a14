"""Do the parts of a run's time add up to its wall time, whatever fails in between, and is what is made twice lost?"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.recipe import load
from dpa_ray.report import console
from dpa_ray.report.goodput import LAUNCHED, PARTS, Ledger
from dpa_ray.stages.runs import Run
from dpa_ray.store import Store


class Clock:
    """A run's events, each some seconds after the one before."""

    def __init__(self, before: dict[str, Any] | None = None, start_s: float = 1_000.0):
        self.now_s = start_s
        self.start_s = start_s
        self.ledger = Ledger(start_s, before)

    def after(self, time_s: float, kind: str, **values: Any) -> None:
        self.now_s += time_s
        self.ledger.saw(kind, values, self.now_s)

    def begin(self, stage: str = "proxy_mllm") -> None:
        """10 s of preparing, 20 s until the workers are there, 5 s until a task begins."""
        self.after(10, LAUNCHED)
        self.after(20, "workers_started")
        self.after(5, "task_started", stage=stage, trains=True)

    def step(self, step: int, gap_s: float = 0.0, saving_s: float = 0.0, stage: str = "proxy_mllm") -> None:
        """A step of 4 s, 1 of which it waited for data, after `gap_s`."""
        self.after(gap_s + 4, "step", stage=stage, step=step, step_time_s=4.0, data_wait_s=1.0, saving_s=saving_s)

    def entries(self) -> dict[str, Any]:
        return self.ledger.entries(self.now_s)

    def seconds(self, stage: str | None = None) -> dict[str, float]:
        """The parts that are not 0, by name."""
        parts = self.entries() if stage is None else self.entries()["stages"][stage]
        return {part: round(parts[f"{part}_s"], 6) for part in PARTS if parts[f"{part}_s"] > 1e-9}


def test_an_evaluation_between_steps_is_a_task_of_its_stage() -> None:
    run = Clock()
    run.begin()
    run.step(1)
    run.after(4 + 1.5 + 6 + 0.5, "step", stage="proxy_mllm", step=2, step_time_s=4.0, data_wait_s=1.0, saving_s=1.5, eval_time_s=6.0)  # fmt: skip
    assert run.seconds("proxy_mllm") == {"training": 6, "data_wait": 2, "saving": 1.5, "tasks": 6, "other": 0.5}


def test_a_run_that_nobody_disturbs() -> None:
    run = Clock()
    run.begin()
    run.after(7, "stage_started", stage="proxy_mllm")
    run.step(1, gap_s=3)
    run.step(2, gap_s=2, saving_s=1.5)
    run.step(3, saving_s=1.5)
    run.after(6, "task_finished", stage="proxy_mllm")
    run.after(8, "task_started", stage="eval", trains=False)
    run.after(30, "task_finished", stage="eval")
    run.now_s += 2
    run.ledger.ended(run.now_s)
    assert run.seconds("proxy_mllm") == {
        "training": 9, "data_wait": 3, "saving": 1.5 + 6, "starting": 7 + 3, "other": 0.5
    }  # fmt: skip
    assert run.seconds("eval") == {"tasks": 30}
    entries = run.entries()
    assert entries["outside_stages"]["preparing_s"] == 10
    assert entries["outside_stages"]["starting_s"] == 20 + 5 + 8
    assert entries["outside_stages"]["other_s"] == 2
    assert entries["goodput"] == pytest.approx(9 / (run.now_s - run.start_s))


def test_what_is_made_again_and_the_way_back_are_lost() -> None:
    run = Clock()
    run.begin()
    for step in (1, 2, 3, 4):
        run.step(step)
    before = run.seconds("proxy_mllm")
    run.after(3, "failed")  # in the middle of step 5
    run.after(12, "workers_started")
    run.after(1, "task_started", stage="proxy_mllm", trains=True)
    run.after(2, "stage_started", stage="proxy_mllm")
    run.step(3, gap_s=2)  # the checkpoint was of step 2
    run.step(4)
    run.step(5, gap_s=0.5)
    run.step(6)
    gained = {part: time_s - before.get(part, 0) for part, time_s in run.seconds("proxy_mllm").items()}
    assert gained == {"training": 6, "data_wait": 2, "lost": 3 + 12 + 1 + 2 + 6 + 4 + 0.5}
    assert run.entries()["num_restarts"] == 1


def test_a_failure_in_a_job_of_shards_loses_the_shard_under_way_only() -> None:
    run = Clock()
    run.after(10, LAUNCHED)
    run.after(5, "task_started", stage="blind", trains=False)
    run.after(7, "blind_shard", num_samples=3)
    run.after(4, "failed")
    run.after(9, "workers_started")
    run.after(1, "task_started", stage="blind", trains=False)
    run.after(6, "blind_shard", num_samples=3)
    run.after(1, "task_finished", stage="blind")
    assert run.seconds("blind") == {"tasks": 7 + 6 + 1, "lost": 4 + 9 + 1}


def test_a_stage_whose_last_step_was_saved_ends_after_a_failure_without_a_new_step() -> None:
    run = Clock()
    run.begin()
    run.step(1)
    run.after(1, "failed")
    run.after(9, "workers_started")
    run.after(1, "task_started", stage="proxy_mllm", trains=True)
    run.after(5, "task_finished", stage="proxy_mllm")
    run.after(3, "task_started", stage="instruct", trains=True)
    assert run.seconds("proxy_mllm") == {"training": 3, "data_wait": 1, "lost": 16}
    assert run.entries()["outside_stages"]["starting_s"] == 20 + 5 + 3


def test_a_second_job_goes_on_with_what_the_first_had_spent() -> None:
    first = Clock()
    first.begin()
    for step in (1, 2, 3):
        first.step(step)
    kept = json.loads(json.dumps(first.entries()))  # as run.json has it
    second = Clock(kept, start_s=90_000.0)  # the time between the two is nobody's
    second.begin()
    second.step(2, gap_s=1)  # the checkpoint was of step 1
    second.step(3)
    second.step(4)
    entries = second.entries()
    assert entries["num_attempts"] == 2
    assert entries["training_s"] == 9 + 3
    assert entries["lost_s"] == 8
    assert entries["starting_s"] == 2 * 25 + 1
    assert entries["wall_time_s"] == (first.now_s - first.start_s) + (second.now_s - second.start_s)
    assert entries["reached"] == {"proxy_mllm": 4}


def test_what_goes_on_now_counts_too_as_run_json_may_be_all_that_stays() -> None:
    run = Clock()
    run.begin()
    run.now_s += 11
    assert run.seconds("proxy_mllm") == {"starting": 11}
    run.ledger.saw("failed", {}, run.now_s)
    run.now_s += 5
    assert run.seconds("proxy_mllm") == {"lost": 16}


def test_times_that_contradict_the_clock_are_cut_to_it() -> None:
    """A step says that it took longer than the time since the event before, which was late; or an event is older."""
    run = Clock()
    run.begin()
    run.after(3, "step", stage="proxy_mllm", step=1, step_time_s=5.0, data_wait_s=1.0, saving_s=0.0)
    run.after(-2, "saved", stage="proxy_mllm", step=1)
    run.after(2, "step", stage="proxy_mllm", step=2, step_time_s=0.0, data_wait_s=0.0, saving_s=0.0)
    assert run.seconds("proxy_mllm") == {"training": 2, "data_wait": 1}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up_to_the_wall_time_whatever_happens(seed: int) -> None:
    """Any events in any order, over three attempts; nothing is negative, totals are the sums of stages."""
    draw = random.Random(seed)
    kept: dict[str, Any] | None = None
    wall_time_s = 0.0
    for attempt in range(3):
        run = Clock(kept, start_s=1e9 + 1e6 * attempt)
        for _ in range(60):
            kind = draw.choice(
                [LAUNCHED, "workers_started", "task_started", "step", "step", "step", "failed", "saved", "blind_shard",
                 "task_finished", "note"]
            )  # fmt: skip
            run.after(
                draw.expovariate(1.0), kind, stage=draw.choice(["proxy_llm", "blind", "instruct"]), step=draw.randint(1, 30),
                trains=draw.random() < 0.7, step_time_s=draw.expovariate(1.0), data_wait_s=draw.random(),
                saving_s=draw.random(),
            )  # fmt: skip
        run.now_s += 1
        if draw.random() < 0.5:
            run.ledger.ended(run.now_s)
        wall_time_s += run.now_s - run.start_s
        kept = json.loads(json.dumps(run.entries()))
        whole = [*kept["stages"].values(), kept["outside_stages"]]
        assert kept["wall_time_s"] == pytest.approx(wall_time_s)
        assert sum(kept[f"{part}_s"] for part in PARTS) == pytest.approx(wall_time_s)
        for part in PARTS:
            assert sum(parts[f"{part}_s"] for parts in whole) == pytest.approx(kept[f"{part}_s"])
            assert all(parts[f"{part}_s"] >= 0 for parts in whole)


def test_run_json_keeps_it_for_the_next_attempt_at_the_same_run_only(tmp_path: Path) -> None:
    def run_of(*overrides: str) -> Run:
        return Run(Store(str(tmp_path)), load("tiny", overrides, name="mine", store=str(tmp_path)))

    assert run_of().earlier_goodput() == {}
    clock = Clock()
    clock.begin()
    clock.step(1)
    first = run_of()
    first.goodput = clock.entries
    first.write("running")
    kept = run_of("cluster.workers=3").earlier_goodput()
    assert kept == clock.entries()
    run_of().write("running")  # an attempt that has not counted anything yet
    assert run_of().earlier_goodput() == kept
    assert run_of("seed=7").earlier_goodput() == {}


def test_the_table_shows_what_was_spent_by_stage_and_says_goodput() -> None:
    run = Clock()
    run.begin()
    run.step(1)
    run.after(3, "failed")
    run.step(2, gap_s=20)
    file = io.StringIO()
    console.goodput_table(run.entries(), console.terminal(file, 80))
    lines = [line.split() for line in file.getvalue().splitlines() if line]
    assert lines[0] == ["wall,", "s", "train", "data", "start", "lost", "prep.", "sum"]
    assert lines[1] == ["proxy_mllm", "6.0", "2.0", "0.0", "23", "0.0", "31"]
    assert lines[2][0] == "outside"
    assert " ".join(lines[-1]) == "goodput: 9.1 % of 1 min 06 s, workers replaced 1 time"
