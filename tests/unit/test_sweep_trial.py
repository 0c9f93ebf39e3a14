"""Is a trial's progress told to its sweep in time, and are its events found under the sweep's name?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpa_ray.engine.job import Company, View
from dpa_ray.errors import UserError
from dpa_ray.recipe import RecipeError, load
from dpa_ray.report.console import Progress
from dpa_ray.report.goodput import Ledger
from dpa_ray.stages.runs import Run
from dpa_ray.store.fs import Store
from dpa_ray.sweep.record import one_line
from dpa_ray.sweep.trial import Watch


def step(number: int) -> dict[str, Any]:
    return {"stage": "instruct", "step": number, "nll_mean": float(number), "loss": 1.0, "step_time_s": 0.5}


def test_numbers_are_told_with_their_step_while_the_stage_runs() -> None:
    told: list[dict[str, Any]] = []
    watch = Watch(told.append)
    watch.observe("planned", {"artifacts": {"instruct": "artifacts/instruct-0"}})
    watch.observe("stage_started", {"stage": "instruct", "num_steps": 200})
    for number in range(1, 201):
        watch.observe("step", step(number))
    watch.observe("stage_finished", {"stage": "instruct"})
    first, *steps, last = told
    assert first == {"artifacts": {"instruct": "artifacts/instruct-0"}}
    assert [told["step"] for told in steps] == list(range(4, 201, 4)), "fifty times a stage"
    assert steps[0]["instruct.nll_mean"] == 2.5, "the mean of steps 1 to 4"
    assert steps[-1]["instruct.nll_mean"] == 190.5, "of the last tenth, 181 to 200"
    assert steps[9] | {"unfinished_s": 20.0, "at": ["instruct", 40]} == steps[9]
    assert last == {"unfinished_s": 0.0}


def test_a_stage_that_begins_anew_after_a_failure_has_cost_what_it_did_before() -> None:
    told: list[dict[str, Any]] = []
    watch = Watch(told.append)
    for numbers in (range(1, 5), range(3, 9)):
        watch.observe("stage_started", {"stage": "instruct", "num_steps": 200})
        for number in numbers:
            watch.observe("step", step(number))
    assert [values["unfinished_s"] for values in told] == [2.0, 3.0, 5.0]


def test_tensorboards_files_are_in_the_runs_folder_and_the_sweeps(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    recipe = load("tiny", name="s-0000")
    seen: list[str] = []
    company = Company("s", lambda kind, values: seen.append(kind), lambda tasks, alone: len(tasks))
    with Progress() as progress:
        view = View(progress, recipe, Run(store, recipe), Ledger(0.0), lambda: None, company)
        view.open_trackers()
        view.handle(
            "stage_started",
            {"stage": "instruct", "num_steps": 1, "trainable": "x", "num_parameters": 1, "names": ["a"]},
            1.0,
        )
        view.handle("step", {**step(1), "num_samples": 2, "saving_s": 0.0, "data_wait_s": 0.0}, 2.0)
        view.close(store, "done")
    assert seen == ["stage_started", "step"]
    for folder in ("runs/s-0000/tensorboard/instruct", "sweeps/s/tensorboard/s-0000/instruct"):
        (file,) = (tmp_path / folder).iterdir()
        assert "tfevents" in file.name


def test_a_reason_is_one_line() -> None:
    assert one_line(UserError("a\n  b")) == "a b"
    assert one_line(RecipeError([("cmo", "wrong"), ("", "bad")])) == "cmo: wrong; bad"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(UserError("no answer from http://me:secret@host/x")) == "no answer from http://***@host/x"
    assert len(one_line(UserError("x" * 5000))) == 600


def test_held_out_numbers_are_told_when_they_come_and_as_they_are() -> None:
    """After each evaluation at once, and the latest with every later number: it is no mean over steps."""
    told: list[dict[str, Any]] = []
    watch = Watch(told.append)
    watch.observe("stage_started", {"stage": "instruct", "num_steps": 1000})  # told after every 20th step
    for number in range(1, 101):
        evaluated = {"eval_nll": 100.0 - number, "eval_time_s": 9.0, "eval_num_targets": 5} if number % 30 == 0 else {}
        watch.observe("step", {**step(number), **evaluated})
    assert [(values["step"], values.get("instruct.eval_nll")) for values in told] == [
        (20, None), (30, 70.0), (40, 70.0), (60, 40.0), (80, 40.0), (90, 10.0), (100, 10.0),
    ]  # fmt: skip
    assert told[-1]["unfinished_s"] == 100 * 0.5 + 3 * 9.0, "training stood for them"
    assert not any(key.startswith(("instruct.eval_time", "instruct.eval_num")) for values in told for key in values)


def test_trackers_know_a_run_again_by_what_it_is_and_where(tmp_path: Path) -> None:
    def identity(store: str, *overrides: str) -> str:
        recipe = load("tiny", [*overrides], name="run")
        with Progress() as progress:
            return View(
                progress, recipe, Run(Store(str(tmp_path / store)), recipe), Ledger(0.0), lambda: None
            )._identity()

    assert identity("one") == identity("one", "cluster.workers=3", "checkpoint.every_s=1")
    assert len({identity("one"), identity("two"), identity("one", "seed=1")}) == 3
