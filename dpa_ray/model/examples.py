"""How much does each target of one sample weigh, and how much does the image help with it? For people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.model.cmo import raw_weights, smooth_within_turn
from dpa_ray.model.held_out import both_scores
from dpa_ray.model.step import StepModule


@dataclass
class TokenWeights:
    """The targets of one sample, in their order; on the CPU."""

    position: Tensor  # (N,) int64: where in the sample
    weight: Tensor  # (N,) float32: as in the loss, after clamp and smoothing
    gain: Tensor  # (N,) float32: p - q, whatever the method's weights are; 0 without an image before it


@torch.no_grad()
def token_weights(module: StepModule, batch: Batch) -> TokenWeights:
    """The weights that `module` gives the targets of `batch`, one sample that is not packed; q is computed live.

    Under ZeRO-3 every rank has to call it, with a batch of its own.
    """
    assert len(batch.input_ids) == 1, "several samples"
    found = both_scores(module, batch)
    gain = found.gain
    weight = torch.ones_like(gain)
    if module.weighting.kind != "uniform":
        raw = raw_weights(found.seen, found.blind, found.has_blind, module.weighting)
        weight = smooth_within_turn(raw, batch.turn[found.row, found.column], module.weighting.window)
    return TokenWeights(found.column.cpu(), weight.cpu(), gain.cpu())
