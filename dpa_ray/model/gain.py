"""How much the image helps: p - q of each target, counted in bins, and how well it tells visual words from others.

Counts add over micro-batches and ranks, so that a step needs no list of its targets. Bins are narrow near 0, where most
targets are: equal in the square root of |p - q|.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BINS = 64


def edges() -> np.ndarray:
    """(BINS + 1,) of p - q, from -1 to 1."""
    root = np.linspace(-1, 1, BINS + 1)
    return np.sign(root) * root**2


def counted(gain_N: Tensor, grounded_N: Tensor, counts_N: Tensor) -> Tensor:
    """(2, BINS) float64: targets in each bin, in row 1 those of visually grounded words.

    Args:
        gain_N: (N,) p - q, in [-1, 1]; grounded_N: (N,) bool.
        counts_N: (N,) bool: which targets are counted at all.
    """
    root = gain_N.sign() * gain_N.abs().sqrt()
    index = ((root + 1) * (BINS / 2)).long().clamp(0, BINS - 1) + BINS * grounded_N.long()
    found = torch.zeros(2 * BINS, dtype=torch.float64, device=gain_N.device)
    return found.scatter_add_(0, index, counts_N.double()).view(2, BINS)


def auc(counts: np.ndarray) -> float | None:
    """P(p - q of a visual word > that of another word), ties half, from `counted`; None where either kind is absent.

    0.5 is chance. Values of one bin count as ties.
    """
    others, grounded = counts
    pairs = others.sum() * grounded.sum()
    if pairs == 0:
        return None
    below = np.cumsum(others) - others
    return float((grounded * (below + others / 2)).sum() / pairs)
