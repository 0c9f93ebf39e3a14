"""What does a step keep, of activations, gradients and optimizer state? What its backward needs, and nothing of what is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model.step import StepModule
from dpa_ray.stages.trainable import select_trainable
from tests.random_models import batch_of, make_step, make_vlm

BATCH = ["s2 I s1 t6", "s1 I t3 s2 u4"]
STAGES = [("proxy_mllm", "frozen"), ("instruct", "frozen"), ("instruct", "full")]


def module_of(stage: str, mode: str, kind: str = "prob") -> StepModule:
    module = make_step(make_vlm(), kind).train()
    select_trainable(module.model, stage, mode)
    return module


class Kept:
    """Storages that autograd holds after a forward, and what went into each linear layer, kept alive to tell them apart."""

    def __init__(self, module: StepModule):
        self.saved: dict[int, int] = {}  # storage address to bytes
        self.inputs: dict[str, list[Tensor]] = {}
        for name, part in module.model.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(
                    lambda m, args, name=name: self.inputs.setdefault(name, []).append(args[0])
                )
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.sums = module(batch_of(BATCH))

    def holds(self, layer: str) -> bool:
        """Is any input of a layer whose name ends so held?"""
        found = [x for name, given in self.inputs.items() if name.endswith(layer) for x in given]
        assert found, layer
        return any(x.untyped_storage().data_ptr() in self.saved for x in found)


@pytest.mark.parametrize(("stage", "mode"), STAGES)
def test_inputs_of_frozen_layers_are_not_kept(stage: str, mode: str) -> None:
    """A linear layer's input is what the gradient of its weight needs; that of its input needs the weight alone."""
    kept = Kept(module_of(stage, mode))
    for layer in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert kept.holds(f"language_model.layers.1.{layer}") == (mode == "full"), layer
    assert kept.holds("multi_modal_projector.linear_2")
    assert not kept.holds("vision_tower.encoder.layers.0.mlp.fc1"), "the tower is frozen in every stage"


def test_the_blind_pass_keeps_nothing() -> None:
    """Of two passes of the decoder one has a backward."""
    live, without = Kept(module_of("instruct", "full")), Kept(module_of("instruct", "full", "uniform"))
    assert len(live.inputs["model.language_model.layers.0.mlp.down_proj"]) == 2
    assert len(without.inputs["model.language_model.layers.0.mlp.down_proj"]) == 1
    blind, seen = (x.untyped_storage().data_ptr() for x in live.inputs["model.language_model.layers.0.mlp.down_proj"])
    assert blind not in live.saved
    assert seen in live.saved
    few = 1024  # weights of the targets, a few numbers each
    assert sum(live.saved.values()) <= sum(without.saved.values()) + few


def test_a_frozen_llm_keeps_less_than_a_trained_one() -> None:
    frozen, full = (sum(Kept(module_of(*stage)).saved.values()) for stage in (STAGES[0], STAGES[2]))
    assert frozen < 0.7 * full


@pytest.mark.parametrize(("stage", "mode"), STAGES)
def test_what_is_frozen_has_neither_gradient_nor_optimizer_state(stage: str, mode: str) -> None:
    module = module_of(stage, mode)
    engine = PlainEngine(module, OptimizerSettings((0.9, 0.999), 0.0, 1.0), torch.device("cpu"))
    seen: set[str] = set()
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: seen.add(name))
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    sums = engine.forward(batch_of(BATCH))
    sums.loss.backward()
    trained = {name for name, p in module.model.named_parameters() if p.grad is not None}
    assert (
        trained
        == seen
        == {name for name in before if mode == "full" and "vision_tower" not in name or "projector" in name}
    )
    module.zero_grad()
    engine.backward(engine.forward(batch_of(BATCH)).loss, last=True)
    engine.update(float(sums.weight), 1e-2)
    state: dict[Any, Any] = engine.unsharded.optimizer.state
    assert {id(p) for p in state} == {id(p) for name, p in module.model.named_parameters() if name in trained}
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
