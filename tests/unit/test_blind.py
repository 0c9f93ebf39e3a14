"""Is the short blind pass, image tokens dropped, the same q as the long one, image tokens masked?

Tolerance 1e-6 on q, a probability: both sides compute the same sums in fp32, over other numbers of (masked) keys and in
another order. That is some units of 6e-8 in logits of a few units; a wrong mask or position moves q by 1e-2 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.blind import attention_argument, drop_images, layout_of, row_width, text_before
from dpa_ray.model.vlm import softcap_of
from tests.random_models import VOCABULARY, batch_of, make_llm, make_step, make_vlm, masked_hidden

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
TOLERANCE = 1e-6

# With 4 positions an image: the sliding window of 16 ends inside most of these samples, and inside an image.
CAPTION = "s1 I t6"
NO_BOS = "I t7"
TWO_IMAGES = "s3 I s4 t3 s2 I u9"
TEXT_ONLY = "s5 t9 s12 u3"
LONG = "s6 I s9 t4 I s3 u8 s2 I t6"
SIDE_BY_SIDE = "I I s1 t5"
ONLY_IMAGE = "I I"
SAMPLES = [CAPTION, NO_BOS, TWO_IMAGES, TEXT_ONLY, LONG, SIDE_BY_SIDE]


def embed(llm: Any, ids: Tensor) -> Tensor:
    embedded: Tensor = llm.get_input_embeddings()(ids)
    return embedded


@torch.no_grad()
def masked_q(llm: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """((N,) q of every target, (N,) is there text before it), one sample after the other, by the masked form."""
    found, known = [], []
    cap = softcap_of(llm.config)
    for b in range(len(batch.input_ids)):
        length = int(batch.attention_mask[b].sum())
        ids, image, labels = batch.input_ids[b, :length], batch.image_mask[b, :length], batch.labels[b, :length]
        embeds = embed(llm, ids.masked_fill(image, 0))
        embeds[image] = torch.randn(int(image.sum()), embeds.shape[1]) * embeds.std()  # any image at all
        logits = llm.lm_head(masked_hidden(llm.model, embeds, image))
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        probs = logits.double().softmax(-1)
        for j in (labels != IGNORE_INDEX).nonzero().flatten().tolist():
            text_before = (~image[:j]).nonzero().flatten().tolist()
            known.append(bool(text_before))
            found.append(probs[text_before[-1], labels[j]].item() if text_before else 0.0)
    return torch.tensor(found), torch.tensor(known)


def short_q(llm: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same by the product's blind pass."""
    sample, position = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    module = make_step(llm, "prob")
    scores, known = module._blind(batch, sample, position, batch.labels[sample, position])
    return scores.log_prob.exp().where(known, torch.tensor(0.0)), known


def check(llm: Any, batch: Batch) -> Tensor:
    (expected, known), (found, found_known) = masked_q(llm, batch), short_q(llm, batch)
    assert found_known.tolist() == known.tolist()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    return expected


@pytest.mark.parametrize(
    ("family", "attention"),  # Gemma-2 has no sdpa in transformers: it caps attention's own logits
    [(family, a) for family in FAMILIES for a in ("eager", "sdpa") if (family, a) != ("gemma2", "sdpa")],
)
def test_dropping_the_image_is_masking_it(family: str, attention: str) -> None:
    """All kinds of samples in one right-padded micro-batch, and each of them alone."""
    llm = make_llm(family, attention=attention)
    together = check(llm, batch_of(SAMPLES, extra_padding=3))
    assert (together > 0.05).any(), "the probabilities are not all about 0"
    alone = [check(llm, batch_of([notation])) for notation in SAMPLES]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_that_is_all_image_disturbs_nobody(family: str) -> None:
    llm = make_llm(family)
    batch = batch_of([ONLY_IMAGE, CAPTION, ONLY_IMAGE])
    torch.testing.assert_close(check(llm, batch), check(llm, batch_of([CAPTION])), rtol=0, atol=TOLERANCE)
    nothing, _ = short_q(llm, batch_of([ONLY_IMAGE]))
    assert nothing.shape == (0,)
    text = drop_images(
        *(getattr(batch_of([ONLY_IMAGE]), name) for name in ("input_ids", "attention_mask", "image_mask"))
    )
    hidden = llm.model(
        inputs_embeds=embed(llm, text.input_ids), attention_mask=text.attention_mask, position_ids=text.position_ids
    ).last_hidden_state
    assert torch.isfinite(hidden).all(), "an all-masked row is NaN, which 0 * NaN would carry into the loss"


def test_the_first_target_after_an_image_is_predicted_from_the_last_text() -> None:
    """Of `s1 I t6` from BOS; where no text stands before it, q is not known, and only there."""
    llm = make_llm("llama")
    _, known = short_q(llm, batch_of([CAPTION]))
    assert known.all()
    _, known = short_q(llm, batch_of([NO_BOS]))
    assert known.tolist() == [False] + [True] * 6
    batch = batch_of([CAPTION])
    first = llm.lm_head(llm.model(inputs_embeds=embed(llm, batch.input_ids[:, :1])).last_hidden_state)[0, 0]
    q, _ = short_q(llm, batch)
    assert q[0] == pytest.approx(first.softmax(-1)[batch.labels[0, 5]].item(), abs=TOLERANCE)


def test_image_tokens_are_not_even_embedded() -> None:
    """Their row may be one that the vocabulary has not."""
    q, _ = short_q(make_llm("llama"), batch_of([TWO_IMAGES], image_token_id=VOCABULARY + 1000))
    torch.testing.assert_close(q, short_q(make_llm("llama"), batch_of([TWO_IMAGES]))[0], rtol=0, atol=0)


def test_dropped_text_keeps_its_positions() -> None:
    """By hand: two images of four positions each, then a short sample beside it."""
    batch = batch_of(["s2 I s1 I t2", "I t1"])
    text = drop_images(batch.input_ids, batch.attention_mask, batch.image_mask)
    assert text.position_ids.tolist() == [[0, 1, 6, 11, 12], [4, 0, 0, 0, 0]]
    assert text.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert text.input_ids.tolist()[0] == batch.input_ids[0, [0, 1, 6, 11, 12]].tolist()
    assert text.input_ids.tolist()[1] == [batch.input_ids[1, 4].item(), 0, 0, 0, 0]
    before = text_before(batch.attention_mask, batch.image_mask)
    assert before[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert before[1, :5].tolist() == [0, 0, 0, 0, 0]


def test_texts_share_a_row_where_that_saves_a_tenth() -> None:
    """By hand, in rows of 128: 9, 5 and 3 are one row of 17 instead of three of 9; of 120, 119 and 118 no two fit; 100 and
    20 beside 119 are 2 x 120 places instead of 3 x 119; 128, 120 and 8 are 2 x 128 instead of 3 x 128."""
    config = make_llm("llama").config
    assert row_width(config) == 128
    assert layout_of([9, 0, 5, 3], config) == [[0, 2, 3]]
    assert layout_of([120, 0, 119, 118], config) == [[0], [2], [3]]
    assert sorted(layout_of([100, 20, 119], config)) == [[0, 1], [2]]
    assert sorted(layout_of([128, 120, 0, 8], config)) == [[0], [1, 3]]
    assert layout_of([0, 0], config) == []
    assert layout_of([0, 7], config) == [[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_text_that_q_depends_on_is_passed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step: nothing of samples without an image or a target, nothing behind the last target but one."""
    model = make_vlm(family)
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    module = make_step(model, "prob")
    for notations, num_tokens in (
        (["s2 I s1 t4 s9", "s5 t9", "s3 I s8", "I u2"], 6 + 1),
        (["s5 t9"], 0),
        (["s2 I s3"], 0),
    ):
        seen.clear()
        assert torch.isfinite(module(batch_of(notations)).loss)
        assert len(seen) == 2, "every rank makes both passes, whatever it has"
        passed = seen[0]["inputs_embeds"].shape
        assert passed[0] * passed[1] <= max(num_tokens + 1, 2), (notations, passed)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_shared_rows_q_is_the_same(family: str) -> None:
    """Twelve short texts beside a long one: fewer places than a row for each, and the same q."""
    llm = make_llm(family)
    notations = ["s6 I s9 t4 I s3 u8 s2 I t6 s9 t20", *[f"s{n} I t{n}" for n in range(1, 7)], *["I s1 t2"] * 6]
    widths: list[int] = []
    llm.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    found, _ = short_q(llm, batch_of(notations))
    alone = torch.cat([short_q(llm, batch_of([notation]))[0] for notation in notations[:7]])
    torch.testing.assert_close(found[: len(alone)], alone, rtol=0, atol=TOLERANCE)
    check(llm, batch_of(notations))
    assert widths[0] < len(notations) * 58 / 2, "packed, or this tests nothing"


def test_dropout_of_training_does_not_reach_q() -> None:
    llm = make_llm("llama", attention_dropout=0.5)
    batch = batch_of([CAPTION, TWO_IMAGES])
    expected, _ = short_q(llm, batch)
    module = make_step(llm, "prob").train()
    sample, position = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    scores, _ = module._blind(batch, sample, position, batch.labels[sample, position])
    assert module.training
    assert llm.training
    torch.testing.assert_close(scores.log_prob.exp(), expected, rtol=0, atol=TOLERANCE)


# The traps: what would happen, so that the tests above are known to notice


def decode(llm: Any, batch: Batch, mask: str) -> Tensor:
    """(S, D) text positions of a one-sample batch, by the short pass under another attention mask."""
    text = drop_images(batch.input_ids, batch.attention_mask, batch.image_mask)
    given = {"none": None, "2-D": text.attention_mask, "ours": attention_argument(text, llm.config, torch.float32)}[
        mask
    ]
    with torch.no_grad():
        return llm.model(
            inputs_embeds=embed(llm, text.input_ids), attention_mask=given, position_ids=text.position_ids,
            use_cache=False,
        ).last_hidden_state[0, : int(text.attention_mask.sum())]  # fmt: skip


def decode_masked(llm: Any, batch: Batch) -> Tensor:
    image = batch.image_mask[0]
    with torch.no_grad():
        return masked_hidden(llm.model, embed(llm, batch.input_ids[0].masked_fill(image, 0)), image)[~image]


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_without_a_mask_the_gap_is_taken_for_packing(family: str) -> None:
    llm, batch = make_llm(family), batch_of(["s3 I t6"])
    expected = decode_masked(llm, batch)
    torch.testing.assert_close(decode(llm, batch, "ours"), expected, rtol=0, atol=1e-5)
    assert (decode(llm, batch, "none") - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_trap_a_sliding_window_counts_indices(family: str) -> None:
    """A 2-D mask lets text beyond the window be seen, once the image between is dropped."""
    llm, batch = make_llm(family), batch_of([LONG])
    expected = decode_masked(llm, batch)
    torch.testing.assert_close(decode(llm, batch, "ours"), expected, rtol=0, atol=1e-5)
    assert (decode(llm, batch, "2-D") - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_within_the_window_the_cheap_mask_is_kept(family: str) -> None:
    """Positions 0 to 15 see each other all under a window of 16; one more and some do not."""
    llm = make_llm(family)
    for notation, cheap in (("s4 I t8", True), ("s4 I t9", False)):
        batch = batch_of([notation])
        text = drop_images(batch.input_ids, batch.attention_mask, batch.image_mask)
        assert isinstance(attention_argument(text, llm.config, torch.float32), Tensor) == (
            cheap or family == "mistral" and not hasattr(llm.config, "layer_types")
        )
        torch.testing.assert_close(decode(llm, batch, "ours"), decode_masked(llm, batch), rtol=0, atol=1e-5)


def test_flash_attention_does_not_take_the_gap_for_packing() -> None:
    """Where a mask masks nothing, transformers drops it on the way to flash attention, and in a micro-batch of one sample
    looks for packing in the positions after all."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    batch = batch_of(["s3 I t6"])
    text = drop_images(batch.input_ids, batch.attention_mask, batch.image_mask)
    mask_reaches_flash_attention = not bool(text.attention_mask.all())
    assert mask_reaches_flash_attention or not _is_packed_sequence(text.position_ids, len(text.position_ids))
