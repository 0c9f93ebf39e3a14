"""How well does a model foretell held-out text, all of it and the visually relevant words, with the image and without?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX = "eval_"
"""Of held-out numbers in a line of metrics.jsonl."""

TIME = "eval_time_s"
"""There: how long training stood for them. It is no part of `step_time_s`."""

VISUAL_GAIN = 0.05
"""Where nobody knows the visual words, a target counts as one if its p - q is larger: the paper's lower bound of a weight
(arXiv 2509.14735), the same for every method and whatever the recipe's bounds, so that a sweep over them does not move
what it is judged by."""


@dataclass(frozen=True)
class HeldOutNll:
    """Means over the targets of a held-out set, in nats; None where there is nothing to take a mean of, or no
    number.

    Visual targets are the visually grounded words where the set knows them (builtin:shapes); else the targets whose
    probability the image raised by more than VISUAL_GAIN in this very model, so that another model's are others, and
    `num_visual` belongs beside their nll: where `num_visual_known` is 0, models are not to be compared by it. `_blind` is
    the same without the image, over the targets that any text comes before.
    """

    num_targets: int
    nll: float | None
    nll_blind: float | None
    num_visual: int
    visual_nll: float | None
    visual_nll_blind: float | None
    num_visual_known: int  # of the visual targets, those that the set knows to be: all or none


def held_out_nll(sums: Sequence[Sequence[float]]) -> HeldOutNll:
    """Means from sums over a whole set.

    Args:
        sums: (3, 4): rows are all targets, those known to be visual, those with p - q > VISUAL_GAIN; columns their count,
            the sum of their nll, the count of those with a q, the sum of these targets' nll without the image.
    """
    every, known, helped = sums
    visual = known if known[0] else helped
    return HeldOutNll(
        int(every[0]), _mean(every[1], every[0]), _mean(every[3], every[2]),
        int(visual[0]), _mean(visual[1], visual[0]), _mean(visual[3], visual[2]), int(known[0]),
    )  # fmt: skip


def _mean(total: float, count: float) -> float | None:
    return total / count if count and math.isfinite(total) else None
