"""Does each stage train exactly what the method says, at the rate that it says?"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dpa_ray.model import lora
from dpa_ray.stages.spec import learning_rate
from dpa_ray.stages.trainable import check_trainable, select_trainable
from tests.random_models import make_llm, make_vlm
from tests.small_recipes import CONNECTOR


def test_learning_rate_by_hand() -> None:
    """10 steps, ceil(0.25 * 10) = 3 of warm-up: 1/3, 2/3, 1, then half a cosine over the other 7."""
    rates = [learning_rate(step, 10, 6.0, 0.25) for step in range(10)]
    assert rates[:4] == pytest.approx([2.0, 4.0, 6.0, 6.0])
    assert rates[4:] == pytest.approx([6 * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])
    assert 0 < rates[-1] < 0.4, "the last step still moves"


@pytest.mark.parametrize(
    ("num", "fraction", "expected"),
    [
        (1, 0.03, [1.0]),  # a single step is all warm-up
        (1, 0.0, [1.0]),
        (2, 0.0, [1.0, 0.5]),
        (4, 1.0, [0.25, 0.5, 0.75, 1.0]),
        (4, 0.03, [1.0, 1.0, 0.75, 0.25]),  # 3 % of a few steps is one step
    ],
)
def test_learning_rate_at_the_edges(num: int, fraction: float, expected: list[float]) -> None:
    assert [learning_rate(step, num, 1.0, fraction) for step in range(num)] == pytest.approx(expected)


def test_learning_rate_of_zero_stays_zero() -> None:
    assert {learning_rate(step, 5, 0.0, 0.5) for step in range(5)} == {0.0}


def stage_model(stage: str, mode: str) -> Any:
    """Stage 1's is a causal LLM, with LoRA where the mode says so; the others are LLaVA, with LoRA where the mode says so."""
    if stage == "proxy_llm":
        llm = make_llm("llama")
        if mode == "lora":
            lora.attach(llm, rank=2, alpha=4, dropout=0.0, seed=0)
        return llm
    return make_vlm(lora_rank=2 if mode == "lora" else None)


def expected_names(model: Any, stage: str, mode: str) -> set[str]:
    """By what the method says, from names written out."""
    layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    decoder = "model" if stage == "proxy_llm" else "model.language_model"
    root, connector = f"{decoder}.layers", set() if stage == "proxy_llm" else CONNECTOR
    adapter = {f"{root}.{i}.{name}.lora_{ab}.default.weight" for i in (0, 1) for name in layers for ab in "AB"}
    if mode == "lora":
        return connector | adapter
    if mode == "full":
        norms = ("input_layernorm", "post_attention_layernorm")
        return (
            connector
            | {f"{root}.{i}.{name}.weight" for i in (0, 1) for name in (*layers, *norms)}
            | {f"{decoder}.embed_tokens.weight", f"{decoder}.norm.weight", "lm_head.weight"}
        )
    return CONNECTOR


STAGE_MODES = [("proxy_llm", "lora"), ("proxy_mllm", "frozen"), *(("instruct", m) for m in ("full", "lora", "frozen"))]


@pytest.mark.parametrize(("stage", "mode"), [("proxy_llm", "full"), *STAGE_MODES])
def test_each_stage_trains_exactly_its_set(stage: str, mode: str) -> None:
    """Whatever required a gradient before."""
    for before in (True, False):
        model = stage_model(stage, mode).requires_grad_(before)
        found = select_trainable(model, stage, mode)
        expected = expected_names(model, stage, mode)
        assert set(found.names) == expected
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        named = dict(model.named_parameters())
        assert found.num_parameters == sum(named[name].numel() for name in expected)
        check_trainable(model, {id(named[n]) for n in expected}, found, stage, mode)


@pytest.mark.parametrize(("stage", "mode"), STAGE_MODES)
def test_one_too_many_or_too_few_stops(stage: str, mode: str) -> None:
    """In what has a gradient, in what the optimizer got, and in what was selected at the start."""
    model = stage_model(stage, mode)
    trained = select_trainable(model, stage, mode)
    named = dict(model.named_parameters())
    optimized = {id(named[name]) for name in trained.names}
    frozen = next(name for name in named if name not in trained.names)
    chosen = trained.names[-1]

    named[frozen].requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"parameters with a gradient.*too much: \['{frozen}'\], missing: \[\]"):
        check_trainable(model, optimized, trained, stage, mode)
    named[frozen].requires_grad_(False)
    named[chosen].requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"parameters with a gradient.*too much: \[\], missing: \['{chosen}'\]"):
        check_trainable(model, optimized, trained, stage, mode)
    named[chosen].requires_grad_(True)
    for wrong, words in (
        (optimized | {id(named[frozen])}, rf"in the optimizer.*too much: \['{frozen}'\]"),
        (optimized - {id(named[chosen])}, rf"in the optimizer.*missing: \['{chosen}'\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            check_trainable(model, wrong, trained, stage, mode)
    fewer = dataclasses.replace(trained, names=trained.names[:-1])
    with pytest.raises(RuntimeError, match="selected at the start"):
        check_trainable(model, optimized, fewer, stage, mode)
    check_trainable(model, optimized, trained, stage, mode)


def test_a_stage_that_would_train_nothing_stops() -> None:
    with pytest.raises(RuntimeError, match="nothing to train"):
        select_trainable(make_llm("llama"), "proxy_llm", "lora")
