"""Is q that was computed beforehand, packed and without images, the q of the pass in training?

Tolerance 1e-6 on q, a probability in fp32: see test_blind.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model import blind as kernel
from dpa_ray.model import score
from dpa_ray.model.blind import packed_scores, text_of
from dpa_ray.model.cmo import TargetScores
from dpa_ray.model.vlm import softcap_of
from dpa_ray.pack import first_fit
from tests.random_models import VOCABULARY, batch_of, make_llm, make_step, make_vlm, packed_of

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]
TOLERANCE = 1e-6

SAMPLES = [
    "s1 I t6", "I t7", "s3 I s4 t3 s2 I u9", "s5 t9 s12 u3", "s6 I s9 t4 I s3 u8 s2 I t6", "I I s1 t5", "I I", "s1 I t1",
    "I t1", "s1 I s3", "t3",
]  # fmt: skip
"""Several images, none, one-token answers, no BOS, no target, nothing but image; windows of 16 end inside most."""


def cached(llm: object, batch: Batch, width: int) -> Batch:
    """The batch with q computed beforehand, its texts packed into rows of `width`."""
    texts, places = [], []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask.bool(), batch.labels, strict=True):
        texts.append(text_of(ids[mask].numpy(), (labels[mask] != IGNORE_INDEX).numpy(), VOCABULARY))
        places.append((labels != IGNORE_INDEX).nonzero().flatten())
    lengths = [len(text.input_ids) for text in texts]
    found = packed_scores(
        llm, texts, first_fit(lengths, max(width, *lengths)), softcap=softcap_of(llm.config), num_rows=VOCABULARY
    )  # type: ignore[attr-defined]
    both = torch.zeros(2, *batch.labels.shape)
    for b, (place, scores) in enumerate(zip(places, found, strict=True)):
        assert scores.dtype == np.float32
        both[:, b, place] = torch.from_numpy(scores)
    return replace(batch, log_q=both[0], blind_logit=both[1])


def live(llm: object, batch: Batch) -> tuple[TargetScores, torch.Tensor]:
    sample, position = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return make_step(llm, "prob")._blind(batch, sample, position, batch.labels[sample, position])


@pytest.mark.parametrize("width", [1, 64, 10_000])
@pytest.mark.parametrize(
    ("family", "attention"),  # Gemma-2 has no sdpa in transformers
    [(family, a) for family in FAMILIES for a in ("eager", "sdpa") if (family, a) != ("gemma2", "sdpa")],
)
def test_q_computed_beforehand_is_q_of_training(
    family: str, attention: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text alone in a row, some in a row, all in one; scored in parts that end inside samples."""
    monkeypatch.setitem(score.CHUNK_BYTES, "cpu", 5 * 4 * VOCABULARY)
    llm, batch = make_llm(family, attention=attention), batch_of(SAMPLES)
    scores, known = live(llm, batch)
    found = cached(llm, batch, width)
    place = batch.labels != IGNORE_INDEX
    log_q, logit = found.log_q[place], found.blind_logit[place]  # type: ignore[index]
    assert (log_q > -torch.inf).tolist() == known.tolist()
    assert known.sum() == len(known) - 3, "but for the first words of three samples without BOS"
    torch.testing.assert_close(log_q[known].exp(), scores.log_prob[known].exp(), rtol=0, atol=TOLERANCE)
    # logits are of order 10: their units in the last place are ten times those of q
    torch.testing.assert_close(logit[known], scores.logit[known], rtol=0, atol=10 * TOLERANCE)
    assert (logit[~known] == 0).all()


@pytest.mark.parametrize("kind", ["prob", "logit"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_statistics_are_those_of_training(family: str, kind: str, packed: bool) -> None:
    """Also of targets without text before them (q = 0; cal's lower bound), and of text alone (p = q, to the last bit)."""
    model = make_vlm(family)
    samples = [s for s in SAMPLES if s != "t3"]  # a first token is no target of what the encoder makes
    batch = cached(make_llm(family), batch_of(samples), 64)
    module = make_step(model, kind)
    if packed:
        layout = [[9, 3, 1], [0, 4, 2], [5, 6, 7, 8]]
        plain = packed_of(batch_of(samples), layout)
        batch = _packed_scores_of(batch, plain, layout)
    without = replace(batch, log_q=None, blind_logit=None)
    expected, found = module(without).detached(), module(batch).detached()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    other = replace(batch, log_q=torch.zeros_like(batch.log_q), blind_logit=torch.full_like(batch.log_q, 9.0))  # type: ignore[arg-type]
    assert (module(other).detached() - expected).abs().max() > 0.01, "q of the batch is what counts"


def _packed_scores_of(batch: Batch, packed: Batch, layout: list[list[int]]) -> Batch:
    """`packed` with the scores of the same samples in `batch`."""
    log_q, logit = torch.zeros(packed.labels.shape), torch.zeros(packed.labels.shape)
    assert packed.sample is not None
    for number in range(sum(map(len, layout))):
        here, there = packed.sample == number, batch.attention_mask[number].bool()
        log_q[here], logit[here] = batch.log_q[number, there], batch.blind_logit[number, there]  # type: ignore[index]
    return replace(packed, log_q=log_q, blind_logit=logit)


def test_under_flash_attention_each_text_has_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no mask of blocks; and a mask that masks nothing would be dropped on the way (see test_blind.py)."""
    llm, batch = make_llm("llama", attention="sdpa"), batch_of(["s1 I t6", "s3 I t4 I u2"])
    expected = cached(llm, batch, 64)
    monkeypatch.setattr(kernel, "takes_one_row", lambda config: True)
    seen: dict[str, torch.Tensor] = {}
    llm.base_model.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    found = cached(llm, batch, 64)
    assert seen["attention_mask"].shape == (2, 9 + 1)
    assert not seen["attention_mask"].all(1).any()
    assert found.log_q is not None
    assert expected.log_q is not None
    torch.testing.assert_close(found.log_q.exp(), expected.log_q.exp(), rtol=0, atol=TOLERANCE)
