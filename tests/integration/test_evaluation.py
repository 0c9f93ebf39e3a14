"""Is a run that is evaluated while it trains, killed and gone on with, the run that it would have been otherwise?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.integration.runs import STAGES, Run, make_recipe, run_dpa, start_dpa

EVERY, NUM_STEPS = 4, 10
HELD_OUT = 7  # on two ranks in passes of two: the second has a pass of one, and both make two


@dataclass
class Both:
    """The same recipe, in two stores."""

    plain: Run
    evaluated: Run


@pytest.fixture(scope="module")
def both(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> Both:
    """Two workers under ZeRO-3, whose proxy is trained in full; one is evaluated, and loses a worker in stage 3."""
    folder = assets_dir / "evaluation"
    training = (
        tiny_models.make_captions(folder / "captions", 4 * NUM_STEPS, text_only=(4,), seed=5),
        tiny_models.make_conversations(folder / "conversations", 4 * NUM_STEPS, text_only=(7,), seed=6),
    )
    captions = tiny_models.make_captions(folder / "held_out_captions", HELD_OUT, text_only=(2,), seed=7)
    conversations = tiny_models.make_conversations(folder / "held_out", HELD_OUT, text_only=(3,), seed=8)
    section = {name: {"source": str(data.file), "images": str(data.images), "format": "llava"} for name, data in
               (("eval_captions", captions), ("eval", conversations))}  # fmt: skip
    recipe = make_recipe(
        tiny_llm("llama", bos=True), tiny_tower("clip"), *training, method="dpa", cluster__workers=2,
        deepspeed={"zero_stage": 3}, checkpoint__every_steps=2, data__eval=section["eval"],
        data__eval_captions=section["eval_captions"], stages__proxy_llm__llm="full", debug__record_samples=False,
    )  # fmt: skip
    for stage, lr in {"proxy_llm": 1e-3, "proxy_mllm": 2e-3, "instruct": 1e-3}.items():
        recipe["stages"][stage]["lr"] = lr
    plain = run_dpa(recipe, folder / "plain/store", "run")
    assert plain.returncode == 0, plain.output
    recipe["eval"] = {"every_steps": EVERY, "running_samples": 100}
    running = start_dpa(recipe, folder / "evaluated/store", "run")
    running.wait_for("instruct", EVERY + 1)
    running.kill_worker()
    evaluated = running.finished()
    assert evaluated.returncode == 0, evaluated.output
    return Both(plain, evaluated)


def told(line: dict[str, Any]) -> set[str]:
    return {key for key in line if key.startswith("eval_")}


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_its_way_whoever_looks_on(both: Both, stage: str) -> None:
    """Losses and norms bit for bit; one line a step; held-out numbers every few steps and after the last, once each."""
    plain, evaluated = both.plain.metrics(stage), both.evaluated.metrics(stage)
    assert [line["step"] for line in evaluated] == list(range(1, NUM_STEPS + 1))
    for key in ("loss", "grad_norm", "nll_mean", "weight_mean", "num_tokens"):
        assert [line[key] for line in evaluated] == [line[key] for line in plain]
    assert not any(told(line) for line in plain)
    assert [line["step"] for line in evaluated if told(line)] == [4, 8, 10]
    numbers = {"eval_nll", "eval_num_targets", "eval_num_visual", "eval_time_s"}
    if stage != "proxy_llm":
        numbers |= {"eval_nll_blind"}
    assert all(numbers <= told(line) for line in evaluated if told(line))
    assert len({line["eval_num_targets"] for line in evaluated if told(line)}) == 1
    assert len({line["eval_nll"] for line in evaluated if told(line)}) == 3, "what is trained moves"
    assert both.evaluated.info()["goodput"]["num_restarts"] > 0, "a worker was lost"


@pytest.mark.full
def test_the_last_evaluation_is_that_of_the_finished_model(both: Both) -> None:
    """What stage 3 read of its own model, in parts on two ranks, is what was read of the exported one. 1e-4: fp32 sums in
    other shapes."""
    last, final = both.evaluated.metrics("instruct")[-1], both.evaluated.info()["eval"]["heldout"]
    assert final["num_targets"] == last["eval_num_targets"] > 0
    for key in ("nll", "nll_blind"):
        assert final[key] == pytest.approx(last[f"eval_{key}"], rel=1e-4)
    assert final["num_questions"] >= HELD_OUT
    assert both.plain.info()["eval"]["heldout"] == final


@pytest.mark.full
def test_a_proxy_trained_in_full_is_what_stage_two_reads_with(both: Both) -> None:
    """All of it has moved; what is merged is what was trained; stage 3 begins with the base LLM all the same."""
    trained = load_file(both.plain.artifact("proxy_llm") / "llm.safetensors")
    base = load_file(Path(both.plain.recipe["model"]["llm"]) / "model.safetensors")
    assert all(not torch.equal(trained[name], base[name]) for name in trained)
    merged = AutoModelForCausalLM.from_pretrained(both.plain.artifact("proxy_merged"), dtype=torch.float32)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in merged.named_parameters())
    assert both.plain.metrics("proxy_llm")[-1]["loss"] < both.plain.metrics("proxy_llm")[0]["loss"]
