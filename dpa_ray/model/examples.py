"""How much does each target of one sample weigh, and how much does the image help with it? For people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.cmo import probability_gain, raw_weights, smooth_within_turn
from dpa_ray.model.packed import positions_of
from dpa_ray.model.step import StepModule


@dataclass
class TokenWeights:
    """The targets of one sample, in their order; on the CPU."""

    position: Tensor  # (N,) int64: where in the sample
    weight: Tensor  # (N,) float32: as in the loss, after clamp and smoothing
    gain: Tensor  # (N,) float32: p - q, whatever the method's weights are; 0 in a sample without an image


@torch.no_grad()
def token_weights(module: StepModule, batch: Batch) -> TokenWeights:
    """The weights that `module` gives the targets of `batch`, one sample that is not packed; q is computed live.

    Under ZeRO-3 every rank has to call it, with a batch of its own.
    """
    assert batch.sample is None, "packed"
    assert len(batch.input_ids) == 1, "several samples"
    training = module.training
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # a few samples are not worth compiling layers again
            return _token_weights(module, batch)
    finally:
        module.train(training)


def _token_weights(module: StepModule, batch: Batch) -> TokenWeights:
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    target, positions = batch.labels[row, column], positions_of(batch)
    hidden = module.decoder(
        inputs_embeds=module._embed(batch),
        attention_mask=batch.attention_mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    seen = module.scorer.score(hidden[row, column - 1], target)
    blind, has_blind = module._blind(batch, row, positions[row, column], target)
    if not batch.image_mask.any():  # p and q are the same number, as in the loss
        blind = seen
    gain = probability_gain(seen, blind, has_blind)
    weight = torch.ones_like(gain)
    if module.weighting.kind != "uniform":
        raw = raw_weights(seen, blind, has_blind, module.weighting)
        weight = smooth_within_turn(raw, batch.turn[row, column], module.weighting.window)
    return TokenWeights(column.cpu(), weight.cpu(), gain.cpu())
