"""Does a sweep say truly how it ended, and write nothing of what is another's?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.recipe import Recipe, RecipeError, load
from dpa_ray.store.fs import Store
from dpa_ray.store.local import LocalFolder
from dpa_ray.sweep import main
from dpa_ray.sweep.main import Options, make_plan_of, run
from dpa_ray.sweep.record import Record
from dpa_ray.sweep.state import Sweep


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load("tiny", store=str(tmp_path / "store"))


def record_of(recipe: Recipe, statuses: list[str]) -> Record:
    """The default sweep's record of four trials, as an earlier command left it."""
    plan = make_plan_of(recipe, Options(trials=4))
    record = Record(Store(recipe.store), plan.name, recipe, plan.what)
    for number, status in enumerate(statuses):
        record.add(plan.search.propose(number, []))["status"] = status
    record.write("interrupted")
    return record


def test_with_fewer_trials_than_before_it_is_done_when_those_are(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is to do, and no Ray is started."""
    record = record_of(recipe, ["done", "done", "done", "waiting"])
    assert run(recipe, Options(trials=2)) == 0
    told = capsys.readouterr().out
    assert "goes on: 2 of 2 trials" in told
    assert "budget" not in told
    assert record.store.read_json(f"{record.path}/sweep.json")["status"] == "done"


@pytest.mark.parametrize("budget_is_over", [True, False])
def test_a_sweep_that_is_not_whole_is_interrupted_and_says_why(
    budget_is_over: bool, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(recipe, ["done", "done", "done", "interrupted"])
    assert main._close(make_plan_of(recipe, Options(trials=4)), record, "here", budget_is_over) == 1
    assert ("the time budget is over" in capsys.readouterr().out) == budget_is_over
    assert record.store.read_json(f"{record.path}/sweep.json")["status"] == "interrupted"


def test_trials_are_settled_only_by_who_holds_the_sweep(recipe: Recipe) -> None:
    record = record_of(recipe, ["interrupted", "stopped"])
    runs = [f"runs/{trial['name']}/run.json" for trial in record.trials]
    record.store.write_bytes(runs[0], b"broken")  # keeps no other from being settled
    record.store.write_json(runs[1], {"status": "running"})
    record.taken.set()
    main._settle(record)
    assert record.store.read_json(runs[1])["status"] == "running"
    record.taken.clear()
    main._settle(record)
    assert record.store.read_json(runs[1])["status"] == "stopped"


def test_tune_is_told_to_stop_where_the_sweep_was_taken_over(recipe: Recipe) -> None:
    from dpa_ray.sweep.tuner import _Budget, _Proposals

    record, plan = record_of(recipe, ["waiting"]), make_plan_of(recipe, Options(trials=4))
    sweep = Sweep(record, plan.search, plan.space.recipe)
    assert not _Budget(sweep, None).stop_all()
    record.taken.set()
    assert _Budget(sweep, None).stop_all()
    assert _Proposals(sweep).suggest("0") == "FINISHED"


@pytest.mark.parametrize("err", [UserError("absent"), RecipeError([("data", "absent")])])
def test_what_cannot_be_prepared_is_left_to_its_trials(
    err: Exception, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        tried.append(recipe.model.vision_layer)
        raise err

    monkeypatch.setattr(main, "make_plan", fail)
    layers = [recipe.model.vision_layer, recipe.model.vision_layer - 1]
    points = [{"model.vision_layer": layer} for layer in layers]
    main._prepare(recipe.to_dict(), points, Store(recipe.store), record_of(recipe, []))
    assert tried == layers


def test_a_store_that_is_away_for_a_while_is_waited_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look(recipe: Recipe, plan: Any, store: Store, record: Record) -> bool:
        def away_at_first(self: LocalFolder, path: str) -> bool:
            asked.append(path)
            if len(asked) == 1:
                raise NoAnswer("s3://b: no answer")
            return False

        with monkeypatch.context() as away:
            away.setattr(LocalFolder, "exists", away_at_first)
            assert not store.exists("nowhere")
        return False

    monkeypatch.setattr(main, "_carry_out", look)
    assert run(recipe, Options(trials=2)) == 1, "no trial was run"
    assert asked == ["nowhere", "nowhere"]


def test_a_comparison_that_was_interrupted_says_what_its_finished_trials_show(recipe: Recipe) -> None:
    plan = make_plan_of(recipe, Options(compare=("vanilla", "dpa"), seeds=2))
    record = Record(Store(recipe.store), plan.name, recipe, plan.what)
    Sweep(record, plan.search, plan.space.recipe, label=plan.space.label).propose_all()
    metric = record.values["metric"]
    for trial, score in zip(record.trials, (0.75, 0.5, 0.5), strict=False):
        trial |= {"status": "done", "metrics": {metric: score}}
    record.trials[3]["status"] = "running"
    main._interrupted(plan, record, KeyboardInterrupt())
    found = record.store.read_json(f"{record.path}/sweep.json")
    assert found["status"] == "interrupted"
    assert found["trials"][3]["status"] == "interrupted"
    vanilla, dpa = found["compare"]["metrics"][metric]
    assert vanilla["values"] == {"0": 0.75, "1": 0.5}
    assert dpa["difference"]["num_pairs"] == 1
    assert dpa["difference"]["mean"] == pytest.approx(-0.25)


@pytest.mark.parametrize("known", [(9.0, 9.0, 9.0, 9.0), (9.0, 0.0, 9.0, 9.0), None])
def test_losses_of_visual_words_are_compared_where_they_are_the_same_words(
    recipe: Recipe, known: tuple[float, ...] | None
) -> None:
    """Where nobody knows them, each model has its own, and a difference would be one of selection."""
    plan = make_plan_of(recipe, Options(compare=("vanilla", "dpa"), seeds=2))
    record = Record(Store(recipe.store), plan.name, recipe, plan.what)
    Sweep(record, plan.search, plan.space.recipe, label=plan.space.label).propose_all()
    for number, trial in enumerate(record.trials):
        metrics = {record.values["metric"]: 0.5, "eval.heldout.nll": 1.0, "eval.heldout.visual_nll": 1.0}
        if known is not None:
            metrics["eval.heldout.num_visual_known"] = known[number]
        trial |= {"status": "done", "metrics": metrics}
    compared = main._of_variants(plan, record)["compare"]["metrics"]
    assert "eval.heldout.nll" in compared
    assert ("eval.heldout.visual_nll" in compared) == (known is not None and all(known))
