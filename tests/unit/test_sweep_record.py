"""Does sweep.json count what was made, what was reused and what it cost, and can a sweep go on from it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpa_ray.errors import LeaseTaken, NoAnswer, UserError
from dpa_ray.recipe import Recipe, RecipeError, load
from dpa_ray.store.artifacts import commit
from dpa_ray.store.fs import Store
from dpa_ray.sweep.measures import Running, comes_while_running, default_metric, default_mode, final, problem
from dpa_ray.sweep.record import Record, account, best, commits_of
from dpa_ray.sweep.search import Grid
from dpa_ray.sweep.space import parse_space
from dpa_ray.sweep.state import Sweep

WHAT = {
    "search": "grid",
    "metric": "eval.heldout.accuracy",
    "mode": "max",
    "seed": 0,
    "space": {"cmo.upper": [0.4, 0.6]},
}
DONE = {"final": {"eval.heldout.accuracy": 0.5}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    return load("tiny")


def make_sweep(store: Store, tiny: Recipe, **values: Any) -> Sweep:
    """A sweep as the command makes it, taken up where there is one."""
    space = parse_space(values.pop("space", {"cmo.upper": [0.4, 0.6], "stages.proxy_llm.lora.rank": [4, 8]}), tiny)[0]
    record = Record(store, "s", tiny, WHAT)
    record.take_up()
    sweep = Sweep(record, Grid(space), space.recipe, **values)
    sweep.propose_all()
    return sweep


def trial(name: str, artifacts: dict[str, str], unfinished_s: float = 0.0) -> dict[str, Any]:
    return {"name": name, "artifacts": artifacts, "unfinished_s": unfinished_s}


def test_made_and_reused_are_counted_by_who_made_what_and_cost_by_its_time() -> None:
    """Two trials share a proxy of 10 s on 2 workers; a blind cache is from before; the second broke off after 3 s."""
    metas = {
        "p": {"run": "runs/s-0", "wall_time_s": 10.0, "world_size": 2},
        "b": {"run": "runs/other", "wall_time_s": 4.0, "world_size": 1},
        "m": {"run": "runs/s-0", "wall_time_s": 5.0, "world_size": 2},
    }
    trials = [
        trial("s-0", {"proxy_llm": "p", "blind": "b", "proxy_mllm": "m"}),
        trial("s-1", {"proxy_llm": "p", "blind": "b", "proxy_mllm": "absent"}, unfinished_s=3.0),
    ]
    stages, cost = account(trials, metas.get, workers=2)
    assert stages == {
        "proxy_llm": {"asked": 2, "made": 1, "reused": 1},
        "blind": {"asked": 2, "made": 0, "reused": 2},
        "proxy_mllm": {"asked": 2, "made": 1, "reused": 0},
    }
    assert cost == {"spent": 2 * 10 + 2 * 5 + 2 * 3, "naive": 2 * (2 * 10 + 4) + 2 * 5 + 2 * 3}
    assert account(trials, metas.get, workers=2, gpus_per_worker=0.5)[1]["spent"] == 18


def test_the_best_trial_is_a_finished_one() -> None:
    trials = [
        {"name": "a", "status": "done", "metrics": {"x": 1.0}}, {"name": "b", "status": "stopped", "metrics": {"x": 0.0}},
        {"name": "c", "status": "done", "metrics": {"x": 3.0}}, {"name": "d", "status": "done", "metrics": {}},
    ]  # fmt: skip
    assert (best(trials, "x", "min"), best(trials, "x", "max"), best(trials, "y", "max")) == ("a", "c", None)


def test_a_sweep_that_was_killed_goes_on_with_what_is_not_finished(store: Store, tiny: Recipe) -> None:
    first = make_sweep(store, tiny, max_running=lambda: 3)
    started = [first.next() for _ in range(2)]
    names = [t["name"] for t in started if t is not None]
    assert [t["overrides"]["stages.proxy_llm.lora.rank"] for t in started if t is not None] == [4, 8]
    assert first.next() is None, "there is room, but each would wait for a proxy"
    first.saw(names[0], DONE)
    first.ended(names[0])
    first.saw(names[1], {"at": ["instruct", 3], "unfinished_s": 2.0, "instruct.nll_mean": 4.0})

    again = make_sweep(store, tiny)
    statuses = {t["name"]: t["status"] for t in again.record.trials}
    assert [statuses[name] for name in names] == ["done", "interrupted"]
    assert again.trial(names[1])["metrics"] == {"instruct.nll_mean": 4.0}
    rest = []
    while (t := again.next()) is not None:
        rest.append(t["name"])
        again.saw(t["name"], DONE)
        again.ended(t["name"])
    assert sorted(rest + names[:1]) == [f"s-{n:04}" for n in range(4)], "the finished one is not among the rest"
    assert again.is_over
    assert [t["status"] for t in store.read_json("sweeps/s/sweep.json")["trials"]] == ["done"] * 4


def test_ends_are_told_apart_and_a_failed_one_is_tried_again(store: Store, tiny: Recipe) -> None:
    lines: list[str] = []
    released: list[str] = []
    sweep = make_sweep(store, tiny, max_running=lambda: 1, tell=lines.append, release=released.append)
    names = [t["name"] for t in sweep.record.trials]
    for name, told, error in (
        (names[0], {"failed": "no such image"}, None),
        (names[1], {"at": ["instruct", 30]}, None),
        (names[2], {}, "its node was lost"),
    ):
        started = sweep.next()
        assert started is not None
        assert started["name"] == name
        sweep.saw(name, told)
        sweep.ended(name, error)
    sweep.next()
    sweep.budget_is_over = True
    sweep.ended(names[3])
    found = [(t["status"], t["reason"]) for t in store.read_json("sweeps/s/sweep.json")["trials"]]
    assert found[0] == ("failed", "no such image")
    assert found[1] == ("stopped", "ASHA stopped it at instruct, step 30")
    assert found[2] == ("failed", "its node was lost")
    assert found[3][0] == "interrupted"
    assert released == names
    assert f"{names[0]} failed: no such image" in lines
    assert [t["status"] for t in make_sweep(store, tiny).record.trials] == [
        "interrupted", "stopped", "interrupted", "interrupted",
    ]  # fmt: skip


def test_a_store_that_is_away_ends_no_trial_and_what_came_meanwhile_is_written_later(
    store: Store, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpa_ray.sweep.record.AWAY_S", 0.0)
    sweep = make_sweep(store, tiny, max_running=lambda: 1)
    sweep.record.write()
    with monkeypatch.context() as away:
        for call in ("write_json", "exists", "read_json"):
            away.setattr(Store, call, no_answer)
        started = sweep.next()
        assert started is not None
        sweep.saw(started["name"], {"artifacts": {"proxy_llm": "artifacts/proxy-llm-abc"}})
        sweep.saw(started["name"], DONE)
        sweep.ended(started["name"])
        with pytest.raises(NoAnswer):
            sweep.record.write("done")  # at the end it is certain, or told
    assert store.read_json("sweeps/s/sweep.json")["trials"][0]["status"] == "waiting"
    assert sweep.next() is not None
    trials = store.read_json("sweeps/s/sweep.json")["trials"]
    assert [trial["status"] for trial in trials] == ["done", "running", "waiting", "waiting"]


def no_answer(*args: Any, **kwargs: Any) -> None:
    raise NoAnswer("s3://b: no answer")


def test_what_runs_when_all_is_ended_at_once_is_interrupted(store: Store, tiny: Recipe) -> None:
    """Tune tells nothing of trials that it ends with the time budget."""
    lines: list[str] = []
    sweep = make_sweep(store, tiny, max_running=lambda: 2, tell=lines.append)
    started = [trial["name"] for trial in (sweep.next(), sweep.next()) if trial is not None]
    sweep.saw(started[0], DONE)
    sweep.budget_is_over = True
    sweep.cut()
    trials = {t["name"]: t for t in store.read_json("sweeps/s/sweep.json")["trials"]}
    assert [trials[name]["status"] for name in started] == ["done", "interrupted"]
    assert "the time budget is over" in trials[started[1]]["reason"]
    assert not sweep.running
    assert not sweep.is_over
    assert len([line for line in lines if "interrupted" in line]) == 1


def test_what_a_stage_that_broke_off_has_cost_is_kept_until_it_is_finished(store: Store, tiny: Recipe) -> None:
    first = make_sweep(store, tiny)
    started = first.next()
    assert started is not None
    name = started["name"]
    first.saw(name, {"artifacts": {}})
    first.saw(name, {"unfinished_s": 40.0, "at": ["proxy_llm", 9]})
    again = make_sweep(store, tiny)
    again.next()
    told = (
        {"artifacts": {}},
        {"unfinished_s": 2.0},
        {"unfinished_s": 5.0},
        {"unfinished_s": 0.0},
        {"unfinished_s": 3.0},
    )
    spent = []
    for result in told:
        again.saw(name, result)
        spent.append(again.trial(name)["unfinished_s"])
    assert spent == [40.0, 42.0, 45.0, 0.0, 3.0]


def test_trials_beyond_what_is_wanted_now_are_not_run(store: Store, tiny: Recipe) -> None:
    before = make_sweep(store, tiny)
    for trial, status in zip(before.record.trials, ("done", "failed", "interrupted", "waiting"), strict=True):
        trial["status"] = status
    before.record.write()
    space = parse_space({"cmo.upper": [0.4, 0.6], "stages.proxy_llm.lora.rank": [4, 8]}, tiny)[0]
    record = Record(store, "s", tiny, WHAT)
    record.take_up()
    fewer = Sweep(record, Grid(space, 2), space.recipe)
    started = fewer.next()
    assert started is not None
    assert started["number"] == 1, "the failed one is tried again"
    fewer.saw(started["name"], DONE)
    fewer.ended(started["name"])
    assert fewer.next() is None
    assert fewer.is_over


def test_a_new_sweep_takes_no_names_of_runs_that_exist(store: Store, tiny: Recipe) -> None:
    record = Record(store, "s", tiny, WHAT)
    store.write_json("runs/s-0004/run.json", {})
    store.write_json("runs/s-0001/lease/1.json", {})  # no run
    record.check_names(4)
    with pytest.raises(RecipeError, match=r"found 1, the first s-0004.*delete .*runs/s-\*"):
        record.check_names(5)


def test_a_sweep_keeps_to_the_commits_that_it_began_with(store: Store, tiny: Recipe) -> None:
    assert commits_of(store, "s") == {}
    record = Record(store, "s", tiny, WHAT)
    record.commits.update({"some/llm": "abc"})
    record.write()
    again = Record(store, "s", tiny, WHAT)
    again.take_up()
    assert again.commits == commits_of(store, "s") == {"some/llm": "abc"}


def test_a_name_belongs_to_one_sweep(store: Store, tiny: Recipe) -> None:
    Record(store, "s", tiny, WHAT).write()
    for recipe, what in ((tiny, {**WHAT, "seed": 1}), (load("tiny", ["seed=4"]), WHAT)):
        with pytest.raises(RecipeError, match="another recipe, space, search or seed"):
            Record(store, "s", recipe, what).take_up()
    assert Record(store, "s", load("tiny", ["cluster.workers=2"]), WHAT).take_up(), "how it is done may change"
    few, many = ({**WHAT, "space": {"compare": ["dpa", "cal"], "seeds": seeds}} for seeds in (2, 5))
    Record(store, "c", tiny, few).write()
    assert Record(store, "c", tiny, many).take_up(), "further seeds only add trials"
    store.write_bytes("sweeps/s/sweep.json", b"[]")
    with pytest.raises(UserError, match="found something else"):
        Record(store, "s", tiny, WHAT).take_up()


def test_counts_come_from_the_manifests_in_the_store(store: Store, tiny: Recipe, tmp_path: Path) -> None:
    record = Record(store, "s", tiny, WHAT)
    added = record.add({})
    added["artifacts"] = {"proxy_llm": "artifacts/proxy-llm-abc"}
    record.write()
    assert record.values["stages"] == {"proxy_llm": {"asked": 1, "made": 0, "reused": 0}}
    (tmp_path / "made").mkdir()
    meta = {"run": "runs/s-0000", "wall_time_s": 2.0, "world_size": 3}
    commit(store, "proxy-llm", "abc", tmp_path / "made", inputs={}, meta=meta)
    record.write()
    assert store.read_json("sweeps/s/sweep.json")["stages"] == {"proxy_llm": {"asked": 1, "made": 1, "reused": 0}}
    assert record.values["gpu_s"] == {"spent": 6.0, "naive": 6.0}


def test_a_stages_number_is_the_mean_of_its_last_steps() -> None:
    running = Running("instruct", 60)  # the last tenth: 6
    for step in range(1, 11):
        running.add({"stage": "instruct", "step": step, "nll_mean": float(step), "updated": True, "gain_auc": None})
    running.add({"stage": "instruct", "step": 11, "loss": float("inf"), "num_tokens": 7})
    assert running.values() == {"instruct.nll_mean": 8.0}, "of steps 6 to 10, which have one"
    records = [{"stage": "instruct", "step": s, "nll_mean": float(s)} for s in range(1, 61)]
    records[29]["eval_nll"], records[39]["eval_nll"] = 7.0, 6.0
    found = final(records, {"heldout": {"accuracy": 0.5, "num_questions": 9, "nll": 1.5, "visual_nll": None}})
    assert found["instruct.eval_nll"] == 6.0, "the latest, however long ago"
    assert (found["eval.heldout.nll"], "eval.heldout.visual_nll" in found) == (1.5, False)
    assert found["instruct.nll_mean"] == 57.5
    assert found["eval.heldout.accuracy"] == 0.5


def test_metrics_have_names_that_are_checked(tiny: Recipe) -> None:
    assert default_metric(tiny) == "eval.heldout.accuracy"
    assert [default_mode(m) for m in ("eval.heldout.accuracy", "instruct.nll_mean")] == ["max", "min"]
    for name in ("eval.heldout.accuracy", "eval.unseen_pairs.shuffled", "proxy_mllm.nll_mean_visual"):
        assert problem(name, tiny) is None
    for name in (
        "accuracy",
        "eval.other.accuracy",
        "eval.accuracy",
        "eval.heldout.acuracy",
        "stage3.loss",
        "instruct.",
    ):
        assert problem(name, tiny) is not None


def test_held_out_numbers_of_a_running_stage_need_a_recipe_that_asks_for_them(tiny: Recipe) -> None:
    """Then ASHA may go by them; by those of the finished model it never can."""
    assert "eval.every_steps" in str(problem("instruct.eval_nll", tiny))
    asked = load("tiny", ["eval.every_steps=9", "data.eval_captions=null"])
    assert problem("instruct.eval_nll", asked) is None
    assert "data.eval_captions" in str(problem("proxy_mllm.eval_visual_nll", asked))
    assert [comes_while_running(name) for name in ("instruct.eval_nll", "eval.heldout.nll")] == [True, False]
    assert default_mode("instruct.eval_nll") == default_mode("eval.heldout.visual_nll") == "min"
    assert problem("eval.heldout.visual_nll", tiny) is None


def test_a_sweep_that_another_process_has_taken_over_is_not_written_any_more(store: Store, tiny: Recipe) -> None:
    record = Record(store, "s", tiny, WHAT)
    record.write()
    record.taken.set()
    with pytest.raises(LeaseTaken, match="taken this sweep over"):
        record.write("done")
    assert store.read_json("sweeps/s/sweep.json")["status"] == "running"


def test_the_store_is_not_asked_at_each_step_for_what_stopped_trials_left_unmade(
    store: Store, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, asked = Record(store, "s", tiny, WHAT), list[str]()
    for number in range(20):
        record.add({"seed": number})
        trial = record.trials[-1]
        trial |= {"status": "stopped", "artifacts": {"instruct": f"artifacts/instruct-{number}"}}
    record.trials[-1]["status"] = "running"
    look = record._meta
    monkeypatch.setattr(record, "_meta", lambda of, path: asked.append(path) or look(of, path))
    record.keep()
    assert len(asked) == 20
    asked.clear()
    record.keep()
    assert asked == ["artifacts/instruct-19"]
    (tmp_path / "made").mkdir()
    commit(store, "instruct", "3", tmp_path / "made", inputs={}, meta={"run": "runs/s-0003", "wall_time_s": 1.0})
    record.trials[3]["status"] = "running"  # the same command again: it goes on
    record.keep()
    assert record.values["stages"]["instruct"]["made"] == 1
    record.trials[3]["status"] = "done"
    record.keep()
    assert record.values["stages"]["instruct"]["made"] == 1
