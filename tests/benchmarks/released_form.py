"""A step as the released code of arXiv 2509.14735 takes it, to compare with: our own implementation.

Shape letters: B samples, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.step import StepModule


class LossAndWeight(NamedTuple):
    """Sums over the targets, as in StepSums."""

    loss: Tensor  # () float32
    weight: Tensor  # () float64


class ReleasedStep(nn.Module):
    """The blind pass is a whole forward with the image masked as keys. fp32 logits of all positions are made for p and
    for q, copied to shift them, and the softmax of each taken: five copies at once (the clone that the released code
    makes besides is left out). Weights are smoothed over the flattened batch, ignored positions read as token 0. Trunk
    and embedding are `step`'s."""

    def __init__(self, step: StepModule):
        super().__init__()
        self.step = step

    @property
    def model(self) -> Any:
        return self.step.model

    def forward(self, batch: Batch) -> LossAndWeight:
        weighting = self.step.weighting
        embeds = self.step._embed(batch)
        labels = batch.labels[:, 1:].flatten()
        token = labels.clamp(min=0).unsqueeze(1)
        with torch.no_grad():
            blind_logits = self._logits(embeds, batch.attention_mask * ~batch.image_mask)
        logits = self._logits(embeds, batch.attention_mask)
        shifted = logits[:, :-1].contiguous().flatten(0, 1)
        with torch.no_grad():
            p = shifted.softmax(-1)
            blind_logits = blind_logits[:, :-1].contiguous().flatten(0, 1)
            q = blind_logits.softmax(-1)
            raw = (p.gather(1, token) - q.gather(1, token)).squeeze(1)
            del p, q, blind_logits
            raw = raw.clamp(weighting.lower, weighting.upper)
            weight = functional.avg_pool1d(
                raw[None, None], weighting.window, 1, weighting.window // 2, count_include_pad=False
            ).flatten()
            weight = torch.where(labels != IGNORE_INDEX, weight, 0.0)
        nll = functional.cross_entropy(shifted, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return LossAndWeight((weight * nll).sum(), weight.sum(dtype=torch.float64))

    def _logits(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) fp32."""
        hidden = self.step.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(hidden).float()
