"""Contrastive Modality Optimization: the weight of each target token.

Source: arXiv 2509.14735 (CMO), arXiv 2405.17871 (CAL). Shape letters: N targets of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TargetScores:
    """What the model says of each target token."""

    log_prob: Tensor  # (N,) float32: log P(target | before)
    logit: Tensor  # (N,) float32: the target's logit, after the model's own soft-capping


@dataclass
class Weighting:
    """How targets are weighted: `kind` uniform | prob (p - q) | logit (CAL), clamped, then smoothed within a turn."""

    kind: str
    lower: float
    upper: float
    window: int


def smooth_within_turn(weight_N: Tensor, turn_N: Tensor, window: int) -> Tensor:
    """Mean of each weight over its window of neighbouring targets; a window never leaves its turn.

    Args:
        weight_N: (N,) float32, in the order of the targets.
        turn_N: (N,) int64, one number per (sample, turn): equal numbers are contiguous.
        window: odd; at a turn's edges the mean is over fewer.
    """
    if window == 1 or weight_N.numel() == 0:
        return weight_N
    total, count = weight_N.clone(), torch.ones_like(weight_N)
    for shift in range(1, window // 2 + 1):
        same = (turn_N[shift:] == turn_N[:-shift]).to(weight_N.dtype)
        total[shift:] += weight_N[:-shift] * same
        count[shift:] += same
        total[:-shift] += weight_N[shift:] * same
        count[:-shift] += same
    return total / count


@torch.no_grad()
def probability_gain(seen: TargetScores, blind: TargetScores, has_blind_N: Tensor) -> Tensor:
    """(N,) p - q; q = 0 where there is no text before the target."""
    return seen.log_prob.exp() - torch.where(has_blind_N, blind.log_prob.exp(), 0.0)


@torch.no_grad()
def raw_weights(seen: TargetScores, blind: TargetScores, has_blind_N: Tensor, weighting: Weighting) -> Tensor:
    """clamp(p - q, lower, upper), or CAL's clamp(logit difference), before smoothing.

    Args:
        seen: scores with the image; blind: without it, meaningless where `has_blind_N` is False.
        has_blind_N: (N,) bool: is there any text before this target? Where not, q = 0, and CAL takes its lower bound.
    """
    if weighting.kind == "prob":
        return probability_gain(seen, blind, has_blind_N).clamp(weighting.lower, weighting.upper)
    if weighting.kind == "logit":
        difference = torch.where(has_blind_N, seen.logit - blind.logit, weighting.lower)
        return difference.clamp(weighting.lower, weighting.upper)
    raise ValueError(f"expected weights prob or logit, found {weighting.kind}")
