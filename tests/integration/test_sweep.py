"""Does a sweep make each thing once, outlive its trials' failures and its own death, and stop what is behind?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
def test_a_sweep_makes_shared_stages_once_and_goes_past_a_trial_that_fails(tmp_path: Path, recipe: Callable) -> None:
    """2 ranks x 2 bounds and, at rank 8, an lr that diverges in stage 3: its reason is told, the rest goes on."""
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
    before = manifests(tmp_path)
    again = start(recipe(), tmp_path, space).finished()
    assert again.returncode == 0, again.output
    assert manifests(tmp_path) == before
    assert "4 of 4 trials are finished" in again.stdout
