"""Does a sweep make each thing once, outlive its trials' failures and its own death, and stop what is behind?"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpa_ray.store.fs import Store
from dpa_ray.store.lease import looks_held
from tests import tiny_models
from tests.integration.runs import STAGES, Running, make_recipe, start_dpa

RATES = {"proxy_llm": 2.0e-3, "proxy_mllm": 2.0e-3, "instruct": 5.0e-4}


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> Callable[..., dict[str, Any]]:
    """`recipe(**changes)`: all stages train for 6 steps of 4 samples."""
    folder = assets_dir / "sweep"
    data = (
        tiny_models.make_captions(folder / "captions", 24, text_only=(4,), seed=5),
        tiny_models.make_conversations(folder / "conversations", 24, text_only=(7,), seed=6),
    )

    def make(**changes: Any) -> dict[str, Any]:
        changes = {"debug__record_samples": False, **changes}
        made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="dpa", **changes)
        for stage in STAGES:
            made["stages"][stage]["lr"] = RATES[stage]
        return made

    return make


def start(recipe: dict[str, Any], folder: Path, space: dict[str, Any] | None, *arguments: str) -> Running:
    """`python jobs/sweep.py RECIPE --space SPACE --store folder/store --name sweep ...`."""
    if space is not None:
        (folder / "space.yaml").write_text(yaml.safe_dump(space))
        arguments = ("--space", str(folder / "space.yaml"), *arguments)
    return start_dpa(recipe, folder / "store", "sweep", *arguments, job="sweep.py")


def result(folder: Path) -> dict[str, Any]:
    """sweep.json."""
    values: dict[str, Any] = json.loads((folder / "store/sweeps/sweep/sweep.json").read_text())
    return values


def wait_until(running: Running, folder: Path, is_so: Callable[[dict[str, Any]], bool], timeout_s: float = 250) -> None:
    """Until sweep.json is so."""
    until = time.monotonic() + timeout_s
    while running.process.poll() is None and time.monotonic() < until:
        if (folder / "store/sweeps/sweep/sweep.json").exists() and is_so(result(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(running.finished(1).output if running.process.poll() is not None else result(folder))


def statuses(values: dict[str, Any]) -> list[str]:
    return [trial["status"] for trial in values["trials"]]


def manifests(folder: Path) -> dict[str, str]:
    """Every artifact's manifest: when and by which run it was made."""
    found = (folder / "store/artifacts").glob("*/manifest.json")
    return {path.parent.name: path.read_text() for path in found}


def made(values: dict[str, Any]) -> dict[str, int]:
    return {stage: count["made"] for stage, count in values["stages"].items()}


@pytest.mark.ci
def test_a_sweep_makes_shared_stages_once_and_nothing_again(tmp_path: Path, recipe: Callable) -> None:
    """2 ranks x 2 bounds; the same command again makes nothing."""
    space = {"stages.proxy_llm.lora.rank": [4, 8], "cmo.upper": [0.5, 1.0]}
    run = start(recipe(), tmp_path, space).finished()
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["done"] * 4
    assert values["stages"] == {
        "proxy_llm": {"asked": 4, "made": 2, "reused": 2}, "proxy_merged": {"asked": 4, "made": 2, "reused": 2},
        "blind": {"asked": 4, "made": 2, "reused": 2}, "proxy_mllm": {"asked": 4, "made": 4, "reused": 0},
        "instruct": {"asked": 4, "made": 4, "reused": 0},
    }  # fmt: skip
    assert 0 < values["gpu_s"]["spent"] < values["gpu_s"]["naive"]
    assert values["best"] in {trial["name"] for trial in values["trials"]}
    assert all("instruct.nll_mean" in trial["metrics"] for trial in values["trials"])
    assert (tmp_path / "store/runs/sweep-0003/model/model.safetensors").exists()
    assert "sweep-0003" in (tmp_path / "store/sweeps/sweep/report.html").read_text()
    before = manifests(tmp_path)
    again = start(recipe(), tmp_path, space).finished()
    assert again.returncode == 0, again.output
    assert manifests(tmp_path) == before
    assert "4 of 4 trials are finished" in again.stdout


@pytest.mark.full
def test_a_trial_that_fails_in_the_third_stage_is_told_and_the_rest_goes_on(tmp_path: Path, recipe: Callable) -> None:
    """At a learning rate of 1e30 the weights overflow: the stage stops at the first loss that is not finite."""
    run = start(recipe(), tmp_path, {"stages.instruct.lr": [1.0e30, 5.0e-4]}).finished()
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["failed", "done"]
    reason = values["trials"][0]["reason"]
    assert "instruct" in reason
    assert "not finite" in reason
    assert "\n" not in reason
    assert f"sweep-0000 failed: {reason}" in run.stdout
    assert made(values) == {"proxy_llm": 1, "proxy_merged": 1, "blind": 1, "proxy_mllm": 1, "instruct": 1}


@pytest.mark.full
def test_a_controller_that_dies_while_a_trials_workers_start_is_replaced(tmp_path: Path, recipe: Callable) -> None:
    """What it asked for is given back, though the trial's driver, the sweep, lives on: there is no room for its successor's."""
    running = start(recipe(), tmp_path, {"cmo.upper": [0.5, 1.0]})
    controllers = running.wait_for_process("ray::TrainController")
    time.sleep(2.0)
    os.kill(controllers[0], signal.SIGKILL)
    run = running.finished()
    assert run.returncode == 0, run.output
    (log,) = (tmp_path / "store/runs/sweep-0000/logs").rglob("driver.log")
    assert "Ray Train's controller died" in log.read_text()
    assert statuses(result(tmp_path)) == ["done"] * 2


@pytest.mark.full
def test_a_sweep_that_was_killed_goes_on_and_makes_nothing_finished_twice(tmp_path: Path, recipe: Callable) -> None:
    """SIGKILL to everything in the third trial, then Ctrl-C, then to the end; checkpoints are gone on from."""
    made_recipe = recipe(checkpoint__every_steps=2)
    space = {"stages.proxy_llm.lora.rank": [4, 8], "cmo.upper": [0.5, 1.0]}
    running = start(made_recipe, tmp_path, space)
    wait_until(running, tmp_path, lambda values: statuses(values).count("done") == 1)
    running.kill_all()
    before = manifests(tmp_path)
    assert before

    running = start(made_recipe, tmp_path, space)
    wait_until(running, tmp_path, lambda values: statuses(values).count("done") == 2)
    running.process.send_signal(signal.SIGINT)
    interrupted = running.finished(120)
    assert interrupted.returncode == 1, interrupted.output
    assert "interrupted" in interrupted.stderr
    assert result(tmp_path)["status"] == "interrupted"
    running.wait_for_end_of("ray::")
    between = manifests(tmp_path)
    assert {name: between[name] for name in before} == before, "not made again"

    run = start(made_recipe, tmp_path, space).finished()
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["done"] * 4
    after = manifests(tmp_path)
    assert {name: after[name] for name in between} == between, "not made again"
    assert made(values) == {"proxy_llm": 2, "proxy_merged": 2, "blind": 2, "proxy_mllm": 4, "instruct": 4}


@pytest.mark.full
@pytest.mark.parametrize("metric", ["instruct.nll_mean", "instruct.eval_nll"])
def test_asha_stops_what_is_behind_and_frees_its_workers(metric: str, tmp_path: Path, recipe: Callable) -> None:
    """Of two learning rates one learns nothing: at the first rung it is stopped, its workers go, and the next trial runs.

    The good one comes first, so that there is something to be behind of. All share every stage but the last. By the loss
    of training, or by that of held-out conversations.
    """
    made_recipe = recipe()
    if metric == "instruct.eval_nll":
        held_out = tiny_models.make_conversations(tmp_path / "held_out", 8, seed=9)
        made_recipe["data"]["eval"] = {"source": str(held_out.file), "images": str(held_out.images), "format": "llava"}
        made_recipe["eval"] = {"every_steps": 40, "running_samples": 8, "max_samples": 8}
    made_recipe["stages"]["instruct"] |= {"epochs": 100, "max_steps": 600}  # some seconds more than a stop takes
    space = {
        "stages.instruct.lr": [5.0e-3, 1.0e-9, 2.0e-9],
        "sweep": {"metric": metric, "asha": {"metric": metric, "grace_steps": 120, "reduction_factor": 2}},
    }
    running = start(made_recipe, tmp_path, space)
    wait_until(running, tmp_path, lambda values: len(values["trials"]) > 1 and values["trials"][1]["at"] is not None)
    workers = set(running.processes("ray::RayTrainWorker"))
    assert workers, "the second trial trains"
    wait_until(running, tmp_path, lambda values: statuses(values)[1] == "stopped")
    until = time.monotonic() + 60
    while workers & set(running.processes("ray::")) and time.monotonic() < until:
        time.sleep(0.05)
    assert not workers & set(running.processes("ray::")), "its workers are gone"
    assert running.process.poll() is None, "while the sweep goes on"
    run = running.finished()
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["done", "stopped", "stopped"], run.output
    store = Store(str(tmp_path / "store"))
    for trial in values["trials"][1:]:
        assert trial["reason"].startswith("ASHA stopped it at instruct, step ")
        assert trial["at"][1] < 600
        assert trial["unfinished_s"] > 0
        assert not looks_held(store, trial["artifacts"]["instruct"].replace("artifacts/", "leases/"))
        info = store.read_json(f"runs/{trial['name']}/run.json")
        assert (info["status"], info["error"]) == ("stopped", trial["reason"])
    assert values["best"] == "sweep-0000"
    assert made(values)["proxy_mllm"] == made(values)["instruct"] == 1
    again = start(made_recipe, tmp_path, space).finished()
    assert statuses(result(tmp_path)) == ["done", "stopped", "stopped"], again.output


@pytest.mark.full
def test_trials_at_once_wait_for_each_others_stages_without_workers(tmp_path: Path, recipe: Callable) -> None:
    """Three at once on two proxies: each stage is made once, and everything ends."""
    space = {"stages.proxy_llm.lora.rank": [4, 8], "cmo.upper": [0.5, 1.0]}
    run = start(recipe(), tmp_path, space, "--max-concurrent", "3").finished()
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["done"] * 4
    assert made(values) == {"proxy_llm": 2, "proxy_merged": 2, "blind": 2, "proxy_mllm": 4, "instruct": 4}


@pytest.mark.full
def test_a_sweep_is_held_by_one_process_at_a_time(tmp_path: Path, recipe: Callable) -> None:
    made_recipe = recipe()
    made_recipe["stages"]["proxy_llm"] |= {"epochs": 5000, "max_steps": 20_000}
    space = {"cmo.upper": [0.5, 1.0]}
    first = start(made_recipe, tmp_path, space)
    wait_until(first, tmp_path, lambda values: "running" in statuses(values))
    second = start(made_recipe, tmp_path, space).finished()
    assert second.returncode == 1, second.output
    assert "is at work on this" in second.stderr
    first.kill_all()


@pytest.mark.full
def test_three_ranks_by_three_bounds_on_the_embedded_default(tmp_path: Path) -> None:
    """3 proxies, 3 caches of q, 9 connectors and 9 models, as one sweep of `tiny`."""
    short = ["stages.proxy_llm.max_steps=10", "stages.proxy_mllm.max_steps=10", "stages.instruct.max_steps=30"]
    run = start_dpa(Path("tiny"), tmp_path / "store", "sweep", *short, job="sweep.py", folder=tmp_path).finished(3600)
    assert run.returncode == 0, run.output
    values = result(tmp_path)
    assert statuses(values) == ["done"] * 9
    assert made(values) == {
        "proxy_llm": 3, "proxy_merged": 3, "blind": 3, "proxy_mllm": 9, "instruct": 9, "eval": 9,
    }  # fmt: skip
    assert values["gpu_s"]["spent"] < values["gpu_s"]["naive"]


@pytest.mark.full
def test_methods_are_compared_over_seeds(tmp_path: Path, recipe: Callable) -> None:
    arguments = ("--compare", "vanilla,dpa,dpa@instruct", "--seeds", "2", "--metric", "instruct.nll_mean")
    run = start(recipe(), tmp_path, None, *arguments).finished()
    assert run.returncode == 0, run.output
    rows = result(tmp_path)["compare"]["metrics"]["instruct.nll_mean"]
    assert [row["variant"] for row in rows] == ["vanilla", "dpa", "dpa@instruct"]
    for row in rows[1:]:
        assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
    assert "95 % interval" in run.stdout


@pytest.mark.full
def test_a_run_waits_for_the_stages_that_another_run_makes(tmp_path: Path, recipe: Callable) -> None:
    made_recipe = recipe()
    made_recipe["stages"]["proxy_llm"] |= {"epochs": 100, "max_steps": 300}
    first = start_dpa(made_recipe, tmp_path / "store", "first")
    first.wait_for("proxy_llm", 1)
    second = start_dpa(made_recipe, tmp_path / "store", "second", folder=tmp_path / "second").finished()
    assert second.returncode == 0, second.output
    assert first.finished().returncode == 0
    assert "is at work on it; waiting for its result" in second.stdout
    assert second.info()["timings"]["proxy_llm"]["reused"]
    assert [line["step"] for line in second.metrics("proxy_llm")] == list(range(1, 301))
