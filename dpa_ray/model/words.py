"""What is the nll of each target now, and how much does the image help with it?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.cmo import probability_gain
from dpa_ray.model.packed import positions_of
from dpa_ray.model.step import StepModule


@dataclass
class TargetLosses:
    """The targets of a micro-batch, row by row in their order; on the CPU."""

    row: Tensor  # (N,) int64
    column: Tensor  # (N,) int64
    nll: Tensor  # (N,) float32: in nats
    gain: Tensor  # (N,) float32: p - q; 0 without an image, and where it was not asked for


@torch.no_grad()
def target_losses(module: StepModule, batch: Batch, *, with_gain: bool) -> TargetLosses:
    """Of `batch`, which is not packed and on the module's device, in evaluation mode; q is computed live.

    Nothing is drawn and nothing trained. Under ZeRO-3 every rank has to call it, with a batch of its own.
    """
    assert batch.sample is None, "packed"
    training = module.training
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # a few samples are not worth compiling layers again
            return _target_losses(module, batch, with_gain)
    finally:
        module.train(training)


def _target_losses(module: StepModule, batch: Batch, with_gain: bool) -> TargetLosses:
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    target, positions = batch.labels[row, column], positions_of(batch)
    hidden = module.decoder(
        inputs_embeds=module._embed(batch),
        attention_mask=batch.attention_mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    seen = module.scorer.score(hidden[row, column - 1], target)
    gain = torch.zeros_like(seen.log_prob)
    if with_gain and module.is_vlm:
        blind, has_blind = module._blind(batch, row, positions[row, column], target)
        pictured = batch.image_mask.any(1)[row]
        gain = torch.where(pictured, probability_gain(seen, blind, has_blind), gain)
    return TargetLosses(row.cpu(), column.cpu(), -seen.log_prob.cpu(), gain.cpu())
