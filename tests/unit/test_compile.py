"""Are compiled layers the same model, and are they compiled once for all lengths?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.errors import UserError
from dpa_ray.model.step import StepModule
from dpa_ray.recipe import Recipe, RecipeError
from dpa_ray.stages.build import checkpointing, compile_layers
from tests.random_models import batch_of, make_step, make_vlm

SHAPES = [["s2 I s1 t6", "s1 I t3 s2 u4"], ["s5 t9", "s1 I t4", "s3 I s4 t3 s2 I u9"], ["s2 I s1 t5", "s2 I s9 t4"]]
"""Two and three samples, with padding and without."""


def of_step(module: StepModule, batch: Batch) -> dict[str, Tensor]:
    """The loss and every gradient."""
    module.zero_grad()
    sums = module(batch)
    sums.loss.backward()
    grads = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    return {"loss": sums.loss.detach(), **grads}


@pytest.mark.ci
@pytest.mark.parametrize(("lora_rank", "checkpoints"), [(None, False), (2, True)])
def test_compiled_layers_are_the_same_model(lora_rank: int | None, checkpoints: bool) -> None:
    """fp32 to 1e-5 of each tensor's norm: sums in another order, some of them fused. The blind pass too."""
    module = make_step(make_vlm(lora_rank=lora_rank), "prob").train()
    checkpointing(module.model, checkpoints)
    batches = [batch_of(notations) for notations in SHAPES]
    expected = [of_step(module, batch) for batch in batches]
    names = list(module.state_dict())
    torch._dynamo.reset()
    compile_layers(module.decoder)
    assert list(module.state_dict()) == names
    first, last = module.decoder.layers
    assert first._compiled_call_impl is not None
    assert last._compiled_call_impl is None, "it is computed where it is read only"
    torch._dynamo.utils.counters.clear()
    for batch, wanted in zip(batches, expected, strict=True):
        for name, value in of_step(module, batch).items():
            assert (value - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-8, name
    counters = torch._dynamo.utils.counters
    made = counters["stats"]["unique_graphs"]
    assert made > 0, "nothing was compiled"
    assert not counters["graph_break"]
    for notations in (
        ["s4 I s1 t7", "s1 I t8"],
        ["s5 t3", "s1 I t4", "s3 I s5 t3 s2 I u7"],
        ["s2 I s2 t5", "s2 I s8 t6"],
    ):
        of_step(module, batch_of(notations))
    assert counters["stats"]["unique_graphs"] == made, "other lengths need no other program"


def test_without_a_compiler_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"model.compile: expected a C\+\+ compiler on every worker, found no no-such"):
        compile_layers(make_vlm())


def test_compiling_is_refused_where_parameters_come_and_go(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="expected false with deepspeed.zero_stage 3"):
        recipe("model.compile=true", "deepspeed.zero_stage=3")
    for fine in (("deepspeed.zero_stage=2",), ("deepspeed.zero_stage=3", "engine=torch")):
        assert recipe("model.compile=true", *fine).model.compile
