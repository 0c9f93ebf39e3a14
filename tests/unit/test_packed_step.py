"""Is a packed micro-batch the same samples: losses, statistics and gradients, whatever attention and layout?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dpa_ray.model import packed
from dpa_ray.model.lora import attach
from dpa_ray.model.step import StepModule
from dpa_ray.pack import pack
from dpa_ray.stages.build import checkpointing
from tests.random_models import batch_of, make_llm, make_step, make_vlm, packed_of

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
ATTENTIONS = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]  # it has none
CAPTIONS = ["s1 t6", "s1 t25", "s1", "s1 t40", "s1", "s1 t1", "s1 t30", "s1 t9"]
"""Of one token, and so without target; longer than the window of 16. BOS or not, a sample's first token is no target."""
MIXED = ["s1 I t6", "I t5", "s3 I s4 t3 g2 s2 I u9", "s5 t4 s2 u3", "s2 I s3", "I I t2", "s1 I t30"]


def numbers_and_gradients(module: StepModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sums, and the gradients divided by the weight sum as the engine does."""
    module.zero_grad(set_to_none=True)
    sums = module(batch)
    (sums.loss / sums.weight).backward()
    return sums.detached(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def check_same(module: StepModule, notations: Sequence[str], layout: Sequence[Sequence[int]] | None = None) -> None:
    """Within 1e-5, relative to the largest gradient (fp32; the order of summation is all that differs)."""
    alone = batch_of(notations)
    rows = layout or pack(alone.attention_mask.sum(1).tolist(), 64)
    together = packed_of(alone, rows)
    assert len(together.input_ids) < len(alone.input_ids)
    assert (together.num_samples, together.num_tokens, together.num_targets) == (
        alone.num_samples, alone.num_tokens, alone.num_targets,
    )  # fmt: skip
    expected, expected_gradients = numbers_and_gradients(module, alone)
    found, gradients = numbers_and_gradients(module, together)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_packed_captions_are_the_unpacked_ones(family: str, attention: str) -> None:
    module = make_step(make_llm(family, attention=attention), "uniform").train()
    check_same(module, CAPTIONS)
    check_same(module, CAPTIONS, [[3, 0, 2], [7, 6, 5, 4, 1]])


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_with_lora_and_gradient_checkpointing_as_in_stage_1(family: str, attention: str) -> None:
    llm = make_llm(family, attention=attention)
    attach(llm, rank=4, alpha=8, dropout=0.0, seed=3)
    checkpointing(llm, on=True)
    with torch.no_grad():  # LoRA's B starts as 0, and A would have no gradient
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    check_same(make_step(llm, "uniform").train(), CAPTIONS)


@pytest.mark.parametrize("kind", ["prob", "logit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_blind_pass_and_smoothing_stay_inside_their_samples(family: str, kind: str) -> None:
    """Also where turns of the same number meet in a row."""
    module = make_step(make_vlm(family), kind).train()
    check_same(module, MIXED, [[5, 0, 1], [3, 2], [6, 4]])
    check_same(module, MIXED, [[6, 5, 4, 3, 2, 1, 0]])


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention's own mathematics with its backward: torch has kernels of the latter on GPUs only, and refuses here."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_is_the_same_model(family: str) -> None:
    """Masks of blocks for packed samples and for texts beside an image, windows, soft-capped scores."""
    usual, flex = (make_step(make_vlm(family, attention=name), "prob").train() for name in (None, "flex_attention"))
    masks: list[Any] = []
    flex.decoder.register_forward_pre_hook(
        lambda m, _, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = batch_of(MIXED)
    for each in (batch, packed_of(batch, [[5, 0, 1], [3, 2], [6, 4]])):
        expected, expected_gradients = numbers_and_gradients(usual, each)
        found, gradients = numbers_and_gradients(flex, each)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        scale = max(float(g.abs().max()) for g in expected_gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * scale, msg=name)
    ours = [list(mask.values()) if isinstance(mask, dict) else [mask] for mask in masks if not isinstance(mask, Tensor)]
    assert ours, "no mask of blocks was made"
    assert all(isinstance(mask, BlockMask) for each in ours for mask in each)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_of_restarting_positions_for_flash_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is CUDA's; transformers' sdpa and eager read the same arguments (no mask, positions that restart)."""
    module = make_step(make_llm(family, attention=None if family == "gemma2" else "sdpa"), "uniform").train()
    alone = batch_of(CAPTIONS)
    expected, expected_gradients = numbers_and_gradients(module, alone)
    monkeypatch.setattr(packed, "takes_one_row", lambda config: True)
    monkeypatch.setattr("dpa_ray.model.step.takes_one_row", lambda config: True)
    batch = packed_of(alone, [[3, 0, 2], [7, 6, 5, 4, 1]])
    assert batch.input_ids.shape == (2, 70)
    assert module.num_slots(batch) == alone.num_tokens == 119
    seen: dict[str, Any] = {}
    module.decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    found, gradients = numbers_and_gradients(module, batch)
    assert seen["inputs_embeds"].shape[:2] == (1, 119)
    assert seen["attention_mask"] is None
    assert seen["use_cache"] is False
    assert seen["position_ids"][0, :49].tolist() == [*range(41), *range(7), 0]
    assert int((seen["position_ids"] == 0).sum()) == len(CAPTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_positions_restart_in_each_sample() -> None:
    batch = packed_of(batch_of(["s1 t2", "s1", "s1", "s1 t3"]), [[0, 1, 2], [3]])
    assert batch.sample is not None
    assert batch.sample.tolist() == [[0, 0, 0, 1, 2], [3, 3, 3, 3, -1]]
    assert packed.positions_of(batch).tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]


def test_a_sample_does_not_see_its_neighbours() -> None:
    """The loss of one sample's targets does not move when all others' tokens change."""
    module = make_step(make_llm("mistral"), "uniform")
    batch = packed_of(batch_of(["s1 t6", "s1 t9", "s7"]), [[1, 2, 0]])
    assert batch.sample is not None
    batch.labels[batch.sample != 0] = -100
    before = module(batch).loss.item()
    batch.input_ids[batch.sample != 0] = 5
    assert module(batch).loss.item() == pytest.approx(before, rel=1e-6)


def test_slots_are_what_the_decoder_computes() -> None:
    module = make_step(make_llm("llama"), "uniform")
    alone = batch_of(["s1 t5", "s1 t2"])
    assert module.num_slots(alone) == 12
    assert module.num_slots(packed_of(alone, [[0, 1]])) == 9
