"""Are the weights that a report shows those of the loss, and is the text that it shows the sample's?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dpa_ray.batch import IGNORE_INDEX
from dpa_ray.data.words import pieces
from dpa_ray.model.examples import token_weights
from tests.random_models import batch_of, make_step, make_vlm

BOUNDS = {"uniform": None, "prob": (0.03, 0.1), "logit": (0.2, 1.0)}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("notation", ["s1 I t6", "s3 I s4 t3 g2 s2 I u9", "s5 t4 s2 u3", "s2 I s3"])
def test_weights_are_those_of_the_loss(kind: str, notation: str) -> None:
    """Their sum, and of visual words alone, as the training step has it; where each stands."""
    module = make_step(make_vlm(), kind, bounds=BOUNDS[kind]).train()
    batch = batch_of([notation])
    found, sums = token_weights(module, batch), module(batch)
    assert found.position.tolist() == (batch.labels[0] != IGNORE_INDEX).nonzero().flatten().tolist()
    assert float(found.weight.sum()) == pytest.approx(float(sums.weight), rel=1e-5)
    grounded = batch.grounded[0, found.position]
    assert float(found.weight[grounded].sum()) == pytest.approx(float(sums.grounded_weight), rel=1e-5)
    assert module.training, "it goes on as it was"


def test_gain_is_p_minus_q_whatever_the_weights_are() -> None:
    """The same for every method; without an image, none."""
    model = make_vlm()
    with_image = [token_weights(make_step(model, k, bounds=b), batch_of(["s1 I t6"])).gain for k, b in BOUNDS.items()]
    assert torch.equal(with_image[0], with_image[1])
    assert torch.equal(with_image[0], with_image[2])
    assert with_image[0].abs().max() > 0.01
    counts = make_step(model, "prob")(batch_of(["s1 I t6"])).gains.sum(0)
    assert counts.sum() == len(with_image[0])
    assert int((with_image[0] > 0).sum()) == int(counts[32:].sum())
    assert token_weights(make_step(model, "prob"), batch_of(["s5 t4"])).gain.tolist() == [0] * 4


def test_pieces_are_the_text(tiny_llm: Callable[..., Path]) -> None:
    """Also where a character takes several tokens, and where the text ends inside one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm("llama", num_steps=1))
    ids = tokenizer("a red square, 日本 é", add_special_tokens=False)["input_ids"]
    texts = pieces(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "" in texts, "a token inside a character adds nothing"
    assert "\ufffd" not in "".join(texts)
    assert pieces(tokenizer, []) == []
