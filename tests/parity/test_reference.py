"""Is the reference itself right? Its parts against values by hand, transformers' own processors, and the other form of q."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.parity.encoding import IMAGE, Tokens, encode, preprocess
from tests.parity.reference import Reference, Setup, token_weights
from tests.tiny_models import END_OF_TURN, Family, LlavaData, make_tokenizer

NUM_IMAGE_TOKENS = 16
DATE = "26 Jul 2024"


def setup_of(llm: Path, **changes: Any) -> Setup:
    given = {"weights": "prob", "aspect": "pad", "images": Path(), "max_length": 150, **changes}
    return Setup("instruct", llm, **given)


def make(
    tiny_llm: Callable, tiny_tower: Callable, connector: Path, family: Family, bos: bool, **changes: Any
) -> Reference:
    setup = setup_of(tiny_llm(family, bos=bos), tower=tiny_tower("clip"), connector=connector, **changes)
    return Reference(setup)


def some_tokens(reference: Reference, *, bos: bool) -> Tokens:
    """BOS or not, an image, then a caption as targets."""
    tokens = Tokens()
    tokens.add([1] if bos else [])
    tokens.add([IMAGE] * NUM_IMAGE_TOKENS)
    tokens.add(reference.tokenizer("A red star on the left.\n", add_special_tokens=False)["input_ids"], turn=0)
    return tokens


@pytest.fixture(params=["llama", "qwen2", "gemma2"])
def reference(
    request: pytest.FixtureRequest, tiny_llm: Callable, tiny_tower: Callable, random_connector: Path
) -> Reference:
    return make(tiny_llm, tiny_tower, random_connector, request.param, bos=False)


def dropped_logits(reference: Reference, tokens: Tokens) -> torch.Tensor:
    """The blind pass with the image tokens left out and the others' positions kept; equal where no window cuts."""
    kept = [j for j, token in enumerate(tokens.ids) if token != IMAGE]
    ids = torch.tensor([[tokens.ids[j] for j in kept]])
    # the mask must be passed: without one a jump in position_ids is taken for a boundary between packed sequences
    with torch.no_grad():
        return reference.llm(
            input_ids=ids, position_ids=torch.tensor([kept]), attention_mask=torch.ones_like(ids), use_cache=False
        ).logits[0]


@pytest.mark.parametrize("bos", [True, False])
def test_masked_and_dropped_blind_pass_agree(reference: Reference, bos: bool) -> None:
    tokens = some_tokens(reference, bos=bos)
    features = torch.randn(1, NUM_IMAGE_TOKENS, 48)
    masked = reference.logits(tokens, features, blind=True)
    kept = [j for j, token in enumerate(tokens.ids) if token != IMAGE]
    torch.testing.assert_close(masked[kept].float(), dropped_logits(reference, tokens), atol=1e-4, rtol=1e-4)


def test_dropped_blind_pass_is_wrong_behind_a_sliding_window(
    tiny_llm: Callable, tiny_tower: Callable, random_connector: Path
) -> None:
    """Why the masked form is the definition: Mistral's window of 16 counts places, and dropping moves them."""
    reference = make(tiny_llm, tiny_tower, random_connector, "mistral", bos=False)
    tokens = some_tokens(reference, bos=True)
    masked = reference.logits(tokens, torch.randn(1, NUM_IMAGE_TOKENS, 48), blind=True)
    kept = [j for j, token in enumerate(tokens.ids) if token != IMAGE]
    assert (masked[kept].float() - dropped_logits(reference, tokens)).abs().max() > 0.01


def test_q_does_not_depend_on_the_image(reference: Reference) -> None:
    """Also not the first target's, whose p is read at the last image position."""
    tokens = some_tokens(reference, bos=True)
    one, other = (torch.randn(1, NUM_IMAGE_TOKENS, 48) for _ in range(2))
    (d1, n1), (d2, n2) = (reference.differences(tokens, features) for features in (one, other))
    q1, q2 = (np.exp(-np.array(n)) - np.array(d) for n, d in ((n1, d1), (n2, d2)))
    np.testing.assert_allclose(q1, q2, atol=1e-6)
    assert np.abs(np.array(n1) - np.array(n2)).max() > 0.01


def test_q_is_zero_where_no_text_stands_before_the_image(reference: Reference) -> None:
    tokens = some_tokens(reference, bos=False)
    difference, nll = reference.differences(tokens, torch.randn(1, NUM_IMAGE_TOKENS, 48))
    assert difference[0] == pytest.approx(np.exp(-nll[0]), rel=1e-9)
    assert difference[1] != pytest.approx(np.exp(-nll[1]), rel=1e-3)


def test_a_sample_without_image_has_the_lower_bound_everywhere(reference: Reference) -> None:
    tokens = Tokens()
    tokens.add(reference.tokenizer("A red star on the left.\n", add_special_tokens=False)["input_ids"], turn=0)
    difference, _ = reference.differences(tokens, torch.zeros(0, 0, 0))
    assert token_weights(difference, tokens.turn_of_targets(), reference.setup) == pytest.approx(
        [0.05] * len(difference)
    )
    assert len(difference) == len(tokens.ids) - 1, "the first token follows nothing"


def test_final_logits_are_soft_capped(tiny_llm: Callable, tiny_tower: Callable, random_connector: Path) -> None:
    reference = make(tiny_llm, tiny_tower, random_connector, "gemma2", bos=True)
    logits = reference.logits(some_tokens(reference, bos=True), torch.randn(1, NUM_IMAGE_TOKENS, 48), blind=False)
    assert 5 < logits.abs().max() <= 10


def test_weights_by_hand() -> None:
    """Clamped to [0.05, 0.5] first: .05 .3 .5 | .05 .2; then windows within the turns 0 and 1."""
    weights = token_weights([-0.4, 0.3, 0.9, 0.01, 0.2], [0, 0, 0, 1, 1], setup_of(Path()))
    assert weights == pytest.approx([0.35 / 2, 0.85 / 3, 0.8 / 2, 0.25 / 2, 0.25 / 2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
@pytest.mark.parametrize("bos", [True, False])
def test_chat_targets_are_answers_and_their_ends(family: Family, bos: bool, conversations: LlavaData) -> None:
    tokenizer = make_tokenizer(family, bos=bos)
    for sample in conversations.samples.values():
        tokens = encode(tokenizer, sample, "chat", NUM_IMAGE_TOKENS, 10_000, DATE)
        answers = [t["value"] for t in sample["conversations"] if t["from"] == "gpt"]
        for k, text in enumerate(answers):
            of_turn = [token for token, turn in zip(tokens.ids, tokens.turns, strict=True) if turn == k]
            assert tokenizer.decode(of_turn).strip() == text + END_OF_TURN[family]
        images = sample.get("image", [])
        assert tokens.ids.count(IMAGE) == NUM_IMAGE_TOKENS * (1 if isinstance(images, str) else len(images))
        assert tokens.ids.count(tokenizer.bos_token_id) == int(bos)


def test_plain_has_bos_image_caption_and_newline(captions: LlavaData) -> None:
    sample = captions.samples["c1"]
    text = sample["conversations"][1]["value"]
    for bos in (True, False):
        tokenizer = make_tokenizer("llama", bos=bos)
        tokens = encode(tokenizer, sample, "plain", 3, 150, DATE)
        assert tokens.ids[: 3 + bos] == [tokenizer.bos_token_id] * bos + [IMAGE] * 3
        assert tokenizer.decode([tokens.ids[j] for j in tokens.targets]) == text + "\n"


@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_pixels_equal_transformers(aspect: str, captions: LlavaData, tiny_tower: Callable) -> None:
    """fp32 rescaling against our float64: 1e-5 on values of about 1."""
    config = json.loads((tiny_tower("clip") / "preprocessor_config.json").read_text())
    size = {"height": 28, "width": 28}
    if aspect == "crop":
        size = {"shortest_edge": 28}
    processor = LlavaImageProcessorPil(
        do_pad=aspect == "pad", do_center_crop=aspect == "crop", size=size, crop_size={"height": 28, "width": 28},
        image_mean=config["image_mean"], image_std=config["image_std"], resample=config["resample"],
    )  # fmt: skip
    for file in sorted(captions.images.iterdir()):
        theirs = processor(Image.open(file), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess(file, aspect, config), theirs, atol=1e-5)
