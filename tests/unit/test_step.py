"""Are a micro-batch's sums and gradients those of the formulas, sample by sample, with all logits, without padding?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model import vlm
from dpa_ray.model.step import StepModule, StepSums, vision_features
from dpa_ray.stages.build import checkpointing
from tests.random_models import NUM_IMAGE_TOKENS, VOCABULARY, batch_of, make_llm, make_step, make_vlm, masked_hidden

KINDS = ["uniform", "prob", "logit"]
FAMILIES = ["llama", "gemma2", "mistral"]
MIXED = ["s1 I t6", "I t5", "s3 I s4 t3 g2 s2 I u9", "s5 t4 s2 u3", "s2 I s3"]
"""A caption; one without BOS; two images and two turns; text only; no target."""


@dataclass
class Expected:
    """Sums of the reference, as Python numbers, and its loss with a graph."""

    loss: Tensor
    weight: float = 0.0
    nll: float = 0.0
    at_lower: float = 0.0
    at_upper: float = 0.0
    grounded_weight: float = 0.0
    grounded_nll: float = 0.0
    num_grounded: float = 0.0


def connected(model: Any, pixels: Tensor) -> Tensor:
    """(I * P, D) image features by the formula: hidden state -2 without CLS, linear, GELU, linear."""
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    connector = model.model.multi_modal_projector
    hidden = functional.gelu(states @ connector.linear_1.weight.T + connector.linear_1.bias)
    return (hidden @ connector.linear_2.weight.T + connector.linear_2.bias).flatten(0, 1)


def reference(module: StepModule, batch: Batch) -> Expected:
    """Every sample alone and unpadded: p from the logits of all positions, q by masking the image, loops over targets."""
    model, weighting = module.model, module.weighting
    decoder, cap = model.model.language_model, vlm.softcap_of(model.config.text_config)
    features = connected(model, batch.pixel_values) if len(batch.pixel_values) else torch.zeros(0)
    used = 0
    expected = Expected(loss=torch.zeros(()))
    for b in range(len(batch.input_ids)):
        length = int(batch.attention_mask[b].sum())
        ids, image, labels = batch.input_ids[b, :length], batch.image_mask[b, :length], batch.labels[b, :length]
        own, used = features[used : used + int(image.sum())], used + int(image.sum())
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[image] = own

        def logits(hidden: Tensor) -> Tensor:
            raw = model.lm_head(hidden)[:, :VOCABULARY]
            return raw if cap is None else cap * torch.tanh(raw / cap)

        with_image = logits(decoder(inputs_embeds=embeds.unsqueeze(0), use_cache=False).last_hidden_state[0])
        with torch.no_grad():
            blind = logits(masked_hidden(decoder, embeds, image))
        targets = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
        raws = []
        for j in targets:
            text_before = (~image[:j]).nonzero().flatten().tolist()
            p, logit = with_image[j - 1].softmax(-1)[labels[j]].item(), with_image[j - 1, labels[j]].item()
            raw = 1.0
            if weighting.kind == "prob":
                q = blind[text_before[-1]].softmax(-1)[labels[j]].item() if text_before else 0.0
                raw = min(max(p - q, weighting.lower), weighting.upper)
            elif weighting.kind == "logit":
                difference = logit - blind[text_before[-1], labels[j]].item() if text_before else 0.0
                raw = min(max(difference, weighting.lower), weighting.upper)
            raws.append(raw)
        turns = batch.turn[b, targets].tolist()
        half = weighting.window // 2 if weighting.kind != "uniform" else 0
        for n, j in enumerate(targets):
            near = [raws[m] for m in range(max(0, n - half), n + half + 1) if m < len(raws) and turns[m] == turns[n]]
            weight = sum(near) / len(near)
            nll = functional.cross_entropy(with_image[j - 1 : j], labels[j : j + 1])
            grounded = bool(batch.grounded[b, j])
            expected.loss = expected.loss + weight * nll
            expected.weight += weight
            expected.nll += nll.item()
            expected.at_lower += raws[n] <= weighting.lower
            expected.at_upper += raws[n] >= weighting.upper
            expected.grounded_weight += weight * grounded
            expected.grounded_nll += nll.item() * grounded
            expected.num_grounded += grounded
    return expected


def numbers(sums: StepSums) -> dict[str, float]:
    return {name: float(value) for name, value in vars(sums).items() if name != "gains"}


def check_sums(found: StepSums, expected: Expected | StepSums) -> None:
    """fp32 on both sides, sums in another order (padding, dropped image, several rows at once): 1e-5 relative."""
    values = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in vars(expected).items() if k != "gains"}
    if isinstance(expected, StepSums):
        assert found.gains.sum() == expected.gains.sum()
        assert (found.gains - expected.gains).abs().sum() <= 4, "two on the edge of a bin at most"
    assert numbers(found) == pytest.approx(values, rel=1e-5, abs=1e-6)


def gradients(module: StepModule, loss: Tensor) -> dict[str, Tensor | None]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return dict(zip((name for name, _ in named), grads, strict=True))


def trainable(module: StepModule) -> StepModule:
    """What stage 3 trains: all but the tower."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    return module


# The sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_each_sample_alone(family: str, kind: str) -> None:
    """All eight sums."""
    bounds = {"uniform": None, "prob": (0.03, 0.1), "logit": (0.2, 1.0)}[kind]
    module = make_step(make_vlm(family), kind, bounds=bounds)
    batch = batch_of(MIXED, extra_padding=2)
    expected = reference(module, batch)
    check_sums(module(batch), expected)
    assert expected.num_grounded == 2
    if kind != "uniform":
        num_between = batch.num_targets - expected.at_lower - expected.at_upper
        assert min(expected.at_lower, expected.at_upper, num_between) >= 2, (
            "targets below, above and between the bounds"
        )


@pytest.mark.parametrize("window", [1, 5])
def test_other_windows(window: int) -> None:
    module = make_step(make_vlm(), "prob", window=window)
    batch = batch_of(MIXED)
    check_sums(module(batch), reference(module, batch))


def test_a_reserved_image_row_takes_part_in_the_softmax() -> None:
    """It is one of the base LLM's rows; an appended one is none, whatever stands in it."""
    module = make_step(make_vlm(appended=False), "prob")
    assert module.num_softmax_rows is None
    batch = batch_of(MIXED, image_token_id=VOCABULARY - 1)
    check_sums(module(batch), reference(module, batch))


def test_an_appended_row_changes_nothing_whatever_it_holds() -> None:
    module = make_step(make_vlm(), "prob")
    assert module.num_softmax_rows == VOCABULARY
    batch = batch_of(MIXED)
    before = numbers(module(batch))
    with torch.no_grad():
        module.model.lm_head.weight[VOCABULARY] = 100.0
        module.model.get_input_embeddings().weight[VOCABULARY] = -100.0
    assert numbers(module(batch)) == before


def test_sums_of_statistics_are_float64_and_loss_float32_in_bf16() -> None:
    """Numbers of tokens beyond 2^24 must not be lost; p and q are never bf16, so the weights lie between the bounds."""
    module = make_step(make_vlm(dtype=torch.bfloat16), "prob")
    sums = module(batch_of(MIXED))
    assert sums.loss.dtype == torch.float32
    assert {value.dtype for name, value in vars(sums).items() if name != "loss"} == {torch.float64}
    assert sums.detached().dtype == torch.float64
    full = make_step(make_vlm().bfloat16().float(), "prob")
    # bf16 keeps 8 bits: a hidden state is off by some 2^-8 after two layers, the mean nll of 5 by a few hundredths
    assert numbers(sums)["nll"] / 29 == pytest.approx(numbers(full(batch_of(MIXED)))["nll"] / 29, abs=0.15)


def test_a_causal_llm_without_images_is_plain_cross_entropy() -> None:
    """Stage 1: against torch's own cross-entropy of all positions."""
    llm = make_llm("qwen2")
    module = make_step(llm, "uniform")
    batch = batch_of(["s1 t7", "s2 t3 s1 u4"])
    sums = module(batch)
    logits = llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=0)
    assert sums.weight == 14
    assert sums.nll == pytest.approx(expected.item(), rel=1e-5)


# The gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_naive_autograd(kind: str, tied: bool) -> None:
    """Of sum(w nll) with w as plain numbers. 1e-5 of the largest entry of each gradient: fp32, other order of sums."""
    module = trainable(make_step(make_vlm(tie_word_embeddings=tied), kind))
    batch = batch_of(MIXED)
    expected, found = gradients(module, reference(module, batch).loss), gradients(module, module(batch).loss)
    assert any("multi_modal_projector" in name for name in found)
    for name, gradient in found.items():
        assert gradient is not None, name
        wanted = expected[name]
        assert wanted is not None, name
        largest = wanted.abs().max()
        assert largest > 0, name
        assert (gradient - wanted).abs().max() <= 1e-5 * largest, name


def test_nothing_but_loss_carries_a_gradient() -> None:
    sums = trainable(make_step(make_vlm(), "prob"))(batch_of(MIXED))
    assert {name for name, value in vars(sums).items() if value.requires_grad} == {"loss"}


def test_gradient_checkpointing_changes_no_number() -> None:
    """It is on in train mode only; so is dropout, which must not reach the blind pass, and here there is none."""
    module = trainable(make_step(make_vlm(), "prob")).train()
    batch = batch_of(MIXED)
    before, expected = numbers(module(batch)), gradients(module, module(batch).loss)
    checkpointing(module.model, True)
    assert numbers(module(batch)) == before
    for name, gradient in gradients(module, module(batch).loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


# Padding, filler, company


def test_padding_takes_no_attention_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal attention does not look behind a sample, so that it need not compute a whole square."""
    module = make_step(make_vlm(), "prob")
    masks = []
    attend = functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        masks.append((args[3] if len(args) > 3 else kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(StepModule, "_embed", lambda self, batch: self.model.get_input_embeddings()(batch.input_ids))
    module(batch_of(["s1 I t6", "s1 I t5"]))
    num_layers = module.decoder.config.num_hidden_layers
    assert masks == [(None, True)] * 2 * num_layers, "forward and blind pass"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    """Neither its length nor which token it is, the image token included."""
    module = make_step(make_vlm(), kind)
    expected = module(batch_of(MIXED))
    for pad_id, extra in ((0, 9), (7, 1), (VOCABULARY, 3)):
        check_sums(module(batch_of(MIXED, pad_id=pad_id, extra_padding=extra)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_is_the_sum_of_its_samples(kind: str) -> None:
    module = make_step(make_vlm(), kind)
    alone = sum(module(batch_of([notation])).detached() for notation in MIXED)
    torch.testing.assert_close(module(batch_of(MIXED)).detached(), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filler", ["s1 I t6", "s4", "I I s3 t2"])
def test_filler_rows_contribute_nothing(filler: str) -> None:
    module = trainable(make_step(make_vlm(), "prob"))
    real, filled = batch_of(MIXED[:2]), batch_of([*MIXED[:2], filler], num_filler=1)
    expected, found = module(real), module(filled)
    check_sums(found, expected)
    wanted = gradients(module, expected.loss)
    for name, gradient in gradients(module, found.loss).items():
        # 1e-5 of the tensor's largest: other rows, another order of sums; single numbers near 0 have no scale of their own
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5 * float(wanted[name].abs().max()) + 1e-9)


# What has no image, or no target


@pytest.mark.parametrize(("kind", "lower"), [("prob", 0.05), ("logit", 1.0)])
def test_text_without_image_weighs_the_lower_bound(kind: str, lower: float) -> None:
    """p and q are the same number there, in a batch of its own and beside samples with images."""
    module = make_step(make_vlm(), kind)
    text = ["s5 t4 s2 u3", "s1 t9"]
    alone = numbers(module(batch_of(text)))
    assert alone["weight"] == pytest.approx(16 * lower, rel=1e-6)
    assert alone["loss"] == pytest.approx(alone["nll"] * lower, rel=1e-6)
    assert (alone["at_lower"], alone["at_upper"]) == (16, 0)
    pictured = numbers(module(batch_of(["s1 I t6"])))
    beside = numbers(module(batch_of(["s1 I t6", *text])))
    assert beside["weight"] - pictured["weight"] == pytest.approx(16 * lower, rel=1e-4)
    assert pictured["weight"] != pytest.approx(6 * lower, rel=0.1), "an image does make a difference"


@pytest.mark.parametrize("kind", ["prob", "logit"])
def test_text_without_image_has_no_weight_above_a_lower_bound_of_zero(kind: str) -> None:
    """Exactly 0: rounding noise in p - q would make an update out of a step that has none. Dropout, which p is under and
    q is not, stands in for the noise of larger models."""
    module = make_step(make_vlm(attention_dropout=0.3), kind, bounds=(0.0, 0.5)).train()
    text = ["s5 t4 s2 u3", "s1 t9"]
    for beside in ([], ["I I I s4"]):
        sums = module(batch_of([*beside, *text]))
        assert sums.weight == 0
        assert sums.loss == 0
    assert module(batch_of(["s1 I t9"])).weight > 0


@pytest.mark.parametrize("kind", ["prob", "logit"])
def test_targets_before_the_first_image_have_no_weight_above_a_lower_bound_of_zero(kind: str) -> None:
    """Before it p is q, to the last bit: not the difference of two passes' rounding."""
    before, behind = (
        make_step(make_vlm(), kind, bounds=(0.0, 5.0))(batch_of([n])) for n in ("s2 t5 s1 I s2", "s2 s1 I s2 t5")
    )
    assert before.weight == 0
    assert before.gains.sum() == 0
    assert behind.gains.sum() == 5


def check_zero_but_attached(module: StepModule, batch: Batch) -> None:
    sums = module(batch)
    assert not sums.detached().any()
    for name, gradient in gradients(module, sums.loss).items():
        assert gradient is not None, f"{name} is not in the graph: that rank's backward would fail alone"
        assert (gradient == 0).all(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("notations", [["s2 I s3"], ["s4"], ["s4", "s2 I I"]])
def test_a_batch_without_target_gives_a_zero_attached_to_the_graph(notations: Sequence[str], kind: str) -> None:
    for tied in (False, True):
        check_zero_but_attached(trainable(make_step(make_vlm(tie_word_embeddings=tied), kind)), batch_of(notations))


def test_a_batch_of_filler_alone_gives_a_zero_attached_to_the_graph() -> None:
    check_zero_but_attached(trainable(make_step(make_vlm(), "prob")), batch_of(["s1 I t6"], num_filler=1))


def test_stage_two_without_image_or_target_still_reaches_the_connector() -> None:
    """Where the connector alone trains, its zero is all that keeps the rank's backward alive."""
    module = make_step(make_vlm(), "prob").requires_grad_(False)
    module.model.model.multi_modal_projector.requires_grad_(True)
    for notations in (["s3 t4"], ["s3"], ["I I"]):
        sums = module(batch_of(notations))
        found = gradients(module, sums.loss)
        assert len(found) == 4
        assert all(g is not None and (g == 0).all() for g in found.values()), notations


def test_text_without_image_still_reaches_every_parameter() -> None:
    module = trainable(make_step(make_vlm(), "prob"))
    for name, gradient in gradients(module, module(batch_of(["s5 t4"])).loss).items():
        assert gradient is not None, name
        assert (gradient == 0).all() == ("multi_modal_projector" in name), name


# Images and their places


def test_more_features_than_places_is_told_with_both_counts() -> None:
    batch = batch_of(["s1 I t3"])
    two = replace(batch, pixel_values=torch.cat([batch.pixel_values] * 2))
    with pytest.raises(ValueError, match=r"found 4 positions and 8 features \(2 images of 4\)"):
        make_step(make_vlm(), "prob")(two)


def test_more_places_than_features_is_told_with_both_counts() -> None:
    batch = batch_of(["s1 I s1 I t3", "I t2"])
    with pytest.raises(ValueError, match=r"found 12 positions and 8 features \(2 images of 4\)"):
        make_step(make_vlm(), "prob")(replace(batch, pixel_values=batch.pixel_values[:2]))


def test_places_without_any_image_are_told_with_both_counts() -> None:
    """Else the image token's own embedding is trained on, silently."""
    batch = batch_of(["s1 I t3"])
    with pytest.raises(ValueError, match="found 4 positions and 0 features"):
        make_step(make_vlm(), "prob")(replace(batch, pixel_values=batch.pixel_values[:0]))


def test_images_fill_their_places_in_order() -> None:
    """Swapping two images of a sample is not the same sample; swapping two whole samples is the same batch."""
    module = make_step(make_vlm(), "prob")
    batch = batch_of(["s1 I s1 I t5"])
    swapped = replace(batch, pixel_values=batch.pixel_values.flip(0))
    assert numbers(module(batch))["nll"] != pytest.approx(numbers(module(swapped))["nll"], rel=1e-3)
    there, back = module(batch_of(["s1 I t6", "s2 I u4"])), module(batch_of(["s2 I u4", "s1 I t6"]))
    check_sums(back, there)


def test_vision_features_are_the_layer_without_cls_and_without_gradient() -> None:
    model = make_vlm()
    pixels = batch_of(["I t1", "I I t1"]).pixel_values
    for layer in (-2, -1, 0, 1):
        model.config.vision_feature_layer = layer
        found = vision_features(model, pixels)
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert found.shape == (3, NUM_IMAGE_TOKENS, 24)
        assert not found.requires_grad
        torch.testing.assert_close(found, states[layer][:, 1:], rtol=0, atol=0)
    model.config.vision_feature_select_strategy = "full"
    assert vision_features(model, pixels).shape == (3, NUM_IMAGE_TOKENS + 1, 24)


def test_the_loss_is_llavas_own() -> None:
    """Uniform weights: what LlavaForConditionalGeneration computes from the same tensors (a reserved row: over all)."""
    model = make_vlm(appended=False)
    batch = batch_of(["s1 I t6", "I t5", "s3 I s4 t3 s2 I u9"], image_token_id=VOCABULARY - 1)
    sums = make_step(model, "uniform")(batch)
    theirs = copy.deepcopy(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values
    ).logits
    expected = functional.cross_entropy(theirs[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=0)
