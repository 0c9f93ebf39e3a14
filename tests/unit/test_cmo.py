"""Are probabilities, token weights and their smoothing what the papers' formulas say?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpa_ray.model.cmo import TargetScores, Weighting, raw_weights, smooth_within_turn
from dpa_ray.model.score import TargetScorer

PROB = Weighting("prob", 0.05, 0.5, 3)
LOGIT = Weighting("logit", 1.0, 5.0, 3)


def random_logits(num_targets: int = 50, num_rows: int = 300, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(num_targets, num_rows, generator=generator) * 6).to(dtype)


def score_targets(logits: Tensor, target: Tensor, *, softcap: float | None, num_rows: int | None) -> TargetScores:
    """The scorer's answer for given logits: hidden states under a head that is the identity, which is exact."""
    head = torch.nn.Linear(logits.shape[1], logits.shape[1], bias=False, dtype=logits.dtype).requires_grad_(False)
    torch.nn.init.eye_(head.weight)
    return TargetScorer(head, softcap=softcap, num_rows=num_rows).score(logits, target)


def random_targets(num_targets: int = 50, num_rows: int = 300) -> Tensor:
    return torch.randint(0, num_rows, (num_targets,), generator=torch.Generator().manual_seed(1))


def reference_log_prob(logits: Tensor, target: Tensor, softcap: float | None = None) -> np.ndarray:
    """log softmax of the targets in float64, by its definition."""
    values = logits.double().numpy()
    if softcap is not None:
        values = softcap * np.tanh(values / softcap)
    shifted = values - values.max(1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return log_probs[np.arange(len(target)), target.numpy()]


def scores(prob: list[float], logit: list[float] | None = None) -> TargetScores:
    return TargetScores(torch.tensor(prob).log(), torch.tensor(logit or [0.0] * len(prob)))


# log P and logit


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_is_the_float64_log_softmax(dtype: torch.dtype, softcap: float | None) -> None:
    """fp32 on values up to 40: its rounding (6e-8 relative) of logit and logsumexp, summed, stays below 1e-5. bf16 logits
    are taken as the numbers that they are; a softmax in bf16 would be off by about 0.1."""
    logits, target = random_logits(dtype=dtype), random_targets()
    found = score_targets(logits, target, softcap=softcap, num_rows=None)
    assert found.log_prob.dtype == found.logit.dtype == torch.float32
    np.testing.assert_allclose(found.log_prob.numpy(), reference_log_prob(logits, target, softcap), atol=1e-5)


def test_soft_cap_by_hand() -> None:
    """30 and 0 under a cap of 10: 10 tanh(3) = 9.9505475, and log P = -log(1 + e^-9.95...); fp32 of 10 is good to 1e-6."""
    found = score_targets(torch.tensor([[30.0, 0.0]]), torch.tensor([0]), softcap=10.0, num_rows=None)
    assert found.logit.item() == pytest.approx(9.9505475, rel=1e-6)
    assert found.log_prob.item() == pytest.approx(-math.log1p(math.exp(-9.9505475)), abs=1e-6)


def test_an_appended_row_moves_no_other_probability() -> None:
    logits, target = random_logits(), random_targets()
    before = score_targets(logits, target, softcap=None, num_rows=None)
    wider = torch.cat([logits, torch.full((50, 1), 100.0)], 1)
    excluded = score_targets(wider, target, softcap=None, num_rows=300)
    torch.testing.assert_close(excluded.log_prob, before.log_prob, rtol=0, atol=0)
    torch.testing.assert_close(excluded.logit, before.logit, rtol=0, atol=0)
    included = score_targets(wider, target, softcap=None, num_rows=None)
    assert (included.log_prob < before.log_prob - 10).all(), "the row is loud enough to be noticed"


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.bfloat16)
    found = score_targets(logits.expand(2, 3), torch.tensor([0, 1]), softcap=None, num_rows=None)
    assert torch.isfinite(found.log_prob).all()
    assert found.log_prob[0] == 0


def test_no_targets_give_empty_scores() -> None:
    found = score_targets(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), softcap=None, num_rows=5)
    assert found.log_prob.shape == found.logit.shape == (0,)


# Raw weights


def test_probability_weights_by_hand() -> None:
    """p - q = .2, -.6, .85, .05 + .01: inside, below, above, just inside of [.05, .5]."""
    seen, blind = scores([0.5, 0.2, 0.9, 0.36]), scores([0.3, 0.8, 0.05, 0.30])
    weights = raw_weights(seen, blind, torch.tensor([True] * 4), PROB)
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.05, 0.5, 0.06]), rtol=0, atol=1e-6)
    assert (weights[1], weights[2]) == (torch.tensor(0.05), torch.tensor(0.5)), "bounds are taken, not approached"


def test_logit_weights_by_hand() -> None:
    """Differences 2.5, -4, 9: inside, below, above of [1, 5]. Probabilities play no part."""
    seen = scores([0.5, 0.5, 0.5], [3.0, -2.0, 10.0])
    blind = scores([0.1, 0.9, 0.2], [0.5, 2.0, 1.0])
    weights = raw_weights(seen, blind, torch.tensor([True] * 3), LOGIT)
    torch.testing.assert_close(weights, torch.tensor([2.5, 1.0, 5.0]), rtol=0, atol=1e-6)


def test_without_text_before_a_target_q_is_zero() -> None:
    """And a CAL weight is its lower bound. What the blind pass said there (here nonsense) does not matter."""
    seen = scores([0.3, 0.9, 0.01], [7.0, 8.0, 9.0])
    nonsense = TargetScores(torch.tensor([math.nan, -0.1, math.inf]), torch.tensor([math.nan, -50.0, math.inf]))
    nobody = torch.tensor([False] * 3)
    torch.testing.assert_close(raw_weights(seen, nonsense, nobody, PROB), torch.tensor([0.3, 0.5, 0.05]))
    assert raw_weights(seen, nonsense, nobody, LOGIT).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["prob", "logit"])
def test_equal_bounds_give_one_weight(kind: str) -> None:
    seen, blind = scores([0.5, 0.2, 0.9], [1.0, 5.0, -3.0]), scores([0.3, 0.8, 0.05], [0.0, 0.0, 0.0])
    weights = raw_weights(seen, blind, torch.tensor([True, True, False]), Weighting(kind, 0.3, 0.3, 3))
    assert weights.tolist() == [pytest.approx(0.3)] * 3
    assert weights.unique().numel() == 1


def test_a_lower_bound_of_zero_is_allowed() -> None:
    weights = raw_weights(scores([0.1]), scores([0.7]), torch.tensor([True]), Weighting("prob", 0.0, 1.0, 1))
    assert weights.tolist() == [0.0]


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weights prob or logit, found entropy"):
        raw_weights(scores([0.5]), scores([0.5]), torch.tensor([True]), Weighting("entropy", 0, 1, 3))


@pytest.mark.parametrize("weighting", [PROB, LOGIT])
def test_no_gradient_flows_through_weights(weighting: Weighting) -> None:
    """d sum(w nll) / d logits = w (softmax - one-hot): the formula with w constant."""
    logits = random_logits(20, 9).div(6).requires_grad_()
    target = random_targets(20, 9)
    seen = score_targets(logits, target, softcap=None, num_rows=None)
    blind = score_targets(random_logits(20, 9).flip(0) / 6, target, softcap=None, num_rows=None)
    raw = raw_weights(seen, blind, torch.ones(20, dtype=torch.bool), weighting)
    weights = smooth_within_turn(raw, torch.zeros(20, dtype=torch.long), 3)
    assert raw.unique().numel() >= 5, "not all at a bound"
    assert not weights.requires_grad
    (weights * -seen.log_prob).sum().backward()
    expected = weights.unsqueeze(1) * (logits.detach().softmax(1) - torch.nn.functional.one_hot(target, 9))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)


# Smoothing


def by_definition(weights: list[float], turns: list[int], window: int) -> list[float]:
    half = window // 2
    means = []
    for j, turn in enumerate(turns):
        near = [weights[i] for i in range(max(0, j - half), min(len(turns), j + half + 1)) if turns[i] == turn]
        means.append(sum(near) / len(near))
    return means


def smoothed(weights: list[float], turns: list[int], window: int) -> list[float]:
    found: list[float] = smooth_within_turn(torch.tensor(weights), torch.tensor(turns), window).tolist()
    return found


def test_window_of_three_by_hand() -> None:
    """Turns of 4, 1 and 2 targets: edges over two, a single one is itself, 9 and 4 never meet 100."""
    weights, turns = [1.0, 2.0, 6.0, 9.0, 100.0, 4.0, 8.0], [0, 0, 0, 0, 1, 5, 5]
    assert smoothed(weights, turns, 3) == pytest.approx([1.5, 3.0, 17 / 3, 7.5, 100.0, 6.0, 6.0])


def test_window_of_five_by_hand() -> None:
    weights, turns = [1.0, 2.0, 6.0, 9.0, 12.0, 50.0], [0, 0, 0, 0, 0, 1]
    assert smoothed(weights, turns, 5) == pytest.approx([3.0, 4.5, 6.0, 7.25, 9.0, 50.0])


def test_window_of_one_changes_nothing() -> None:
    assert smoothed([0.25, 0.5, 0.75], [0, 0, 0], 1) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("window", [3, 5, 9])
def test_no_targets_and_short_turns_are_smoothed(window: int) -> None:
    assert smooth_within_turn(torch.zeros(0), torch.zeros(0, dtype=torch.long), window).shape == (0,)
    assert smoothed([0.5], [0], window) == [0.5]
    assert smoothed([1.0, 3.0], [0, 0], window) == [2.0, 2.0]


def test_smoothing_leaves_its_argument_alone() -> None:
    weights = torch.tensor([1.0, 5.0])
    smooth_within_turn(weights, torch.tensor([0, 0]), 3)
    assert weights.tolist() == [1.0, 5.0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from([1, 3, 5, 7]), st.integers(0, 99))
def test_smoothing_is_the_mean_within_window_and_turn(lengths: list[int], window: int, seed: int) -> None:
    turns = [turn for turn, length in enumerate(lengths) for _ in range(length)]
    weights = torch.rand(len(turns), generator=torch.Generator().manual_seed(seed)).tolist()
    assert smoothed(weights, turns, window) == pytest.approx(by_definition(weights, turns, window), abs=1e-6)
