"""Do image tokens start as large as words, and is nothing touched where they are larger already?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpa_ray.model.connector_scale import match_embedding_scale
from dpa_ray.model.step import vision_features
from tests.random_models import IMAGE_SIZE, make_vlm

PIXELS = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def made(words_rms: float, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose word embeddings have that RMS."""
    model = make_vlm(dtype=dtype)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words *= words_rms / rms(words)
    return model


def rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def images_rms(model: Any) -> float:
    with torch.no_grad():
        pixels = PIXELS.to(model.lm_head.weight.dtype)
        return rms(model.model.multi_modal_projector(vision_features(model, pixels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [1.5, 40])
def test_small_image_tokens_are_scaled_up_to_the_words(times: float, dtype: torch.dtype) -> None:
    words_rms = times * images_rms(made(1.0))
    model = made(words_rms, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert match_embedding_scale(model, PIXELS) == pytest.approx(times, rel=0.06)
    assert images_rms(model) == pytest.approx(words_rms, rel=0.06)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.multi_modal_projector.linear_2.{name}" for name in ("weight", "bias")}


def test_words_are_as_large_as_the_decoder_is_given_them() -> None:
    """Gemma's embedding scales what it looks up: its weights alone are much smaller."""
    model = make_vlm("gemma2")
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight *= 3 * images_rms(model) / rms(embedding.weight)
        words_rms = rms(embedding(torch.arange(embedding.num_embeddings).unsqueeze(0)))
    assert words_rms > 2 * rms(embedding.weight)
    match_embedding_scale(model, PIXELS)
    assert images_rms(model) == pytest.approx(words_rms, rel=0.1)


@pytest.mark.parametrize("times", [0.0, 0.01, 0.99])
def test_larger_ones_stay_as_they_are(times: float) -> None:
    """What LLaVA does; also with embeddings of nothing but zeros."""
    model = made(times * images_rms(made(1.0)))
    before = [p.detach().clone() for p in model.parameters()]
    assert match_embedding_scale(model, PIXELS) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
