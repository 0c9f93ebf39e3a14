"""What does a model say of each target with the image, and without? And the sums of its nll that are added over batches.

Shape letters: N targets of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.cmo import TargetScores, probability_gain
from dpa_ray.model.last_layer import only_read
from dpa_ray.model.packed import attention_mask_of, positions_of
from dpa_ray.model.step import StepModule, spread

SUMS_SHAPE = (3, 4)
"""Of `nll_sums`: groups of targets by count, nll, count of those with a q, and their nll without the image."""


@dataclass
class BothScores:
    """The targets of a micro-batch that is not packed, row by row in their order."""

    row: Tensor  # (N,) int64
    column: Tensor  # (N,) int64
    seen: TargetScores
    blind: TargetScores  # seen's own of a target without an image before it; meaningless where has_blind is False
    has_blind: Tensor  # (N,) bool: is there any text before the target, and can the model see at all?

    @property
    def gain(self) -> Tensor:
        """(N,) p - q."""
        return probability_gain(self.seen, self.blind, self.has_blind)


@torch.no_grad()
def both_scores(module: StepModule, batch: Batch) -> BothScores:
    """p and q of the targets of `batch`, which is not packed, in evaluation mode; q is computed live.

    The module is left in the mode that it was in. Under ZeRO-3 every rank has to call it, with a batch of its own.
    """
    assert batch.sample is None, "packed"
    training = module.training
    module.eval()
    try:
        # A few samples are not worth compiling layers again; but flex attention is fused only where it is compiled.
        flex = module.decoder.config._attn_implementation == "flex_attention"
        with torch.compiler.set_stance("default" if flex else "force_eager"):
            return _both_scores(module, batch)
    finally:
        module.train(training)


def _both_scores(module: StepModule, batch: Batch) -> BothScores:
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    target, positions = batch.labels[row, column], positions_of(batch)
    embeds = module._embed(batch)
    with only_read(module.decoder, row, column - 1, batch.labels.shape):
        hidden = module.decoder(
            inputs_embeds=embeds,
            attention_mask=attention_mask_of(batch, module.decoder.config, embeds.dtype),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    seen = module.scorer.score(hidden[row, column - 1], target)
    if not module.is_vlm:
        return BothScores(row, column, seen, seen, torch.zeros_like(row, dtype=torch.bool))
    pictured = batch.image_mask.cumsum(1)[row, column] > 0
    asked = [values[pictured] for values in (row, positions[row, column], target)]
    blind, has_blind = spread(*module._blind(batch, *asked), pictured)
    # Without an image before it p and q are the same number.
    blind.log_prob = torch.where(pictured, blind.log_prob, seen.log_prob)
    blind.logit = torch.where(pictured, blind.logit, seen.logit)
    return BothScores(row, column, seen, blind, has_blind)


@torch.no_grad()
def nll_sums(module: StepModule, batch: Batch, threshold: float) -> Tensor:
    """(3, 4) float64 over the targets of `batch`; addable over micro-batches and ranks.

    Rows: all targets, those known to be visually grounded, those with p - q > `threshold`. Columns: see SUMS_SHAPE.
    """
    found = both_scores(module, batch)
    seen, blind = -found.seen.log_prob.double(), -found.blind.log_prob.double()
    every = torch.ones_like(found.has_blind)
    helped = found.gain > threshold if module.is_vlm else ~every
    groups = torch.stack([every, batch.grounded[found.row, found.column], helped])
    with_blind = groups & found.has_blind
    columns = (groups, torch.where(groups, seen, 0.0), with_blind, torch.where(with_blind, blind, 0.0))
    return torch.stack([column.double().sum(1) for column in columns], 1)
