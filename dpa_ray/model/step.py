"""One micro-batch through the model: sums and statistics of the weighted loss, for every stage and method.

Shape letters: B rows (of a sample each, or packed), R samples, T positions, S text positions, D width, V vocabulary, N targets, I images, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.model.blind import attention_argument, drop_images, layout_of, starts, text_before
from dpa_ray.model.cmo import TargetScores, Weighting, probability_gain, raw_weights, smooth_within_turn
from dpa_ray.model.gain import BINS, counted
from dpa_ray.model.last_layer import only_read
from dpa_ray.model.packed import apart, attention_mask_of, in_one_row, num_slots, positions_of, takes_one_row
from dpa_ray.model.score import TargetScorer

MOST_TURNS = 2**31
"""No turn's number is as large (int32)."""


@dataclass
class StepSums:
    """Sums over the targets of one micro-batch. Only `loss` carries a gradient."""

    loss: Tensor  # () float32: sum of w * nll
    weight: Tensor  # () float64: sum of w
    nll: Tensor  # () float64: sum of nll
    at_lower: Tensor  # () float64: targets whose weight, before smoothing, is at the lower bound
    at_upper: Tensor  # () float64
    grounded_weight: Tensor  # () float64: sum of w over targets known to be visually grounded
    grounded_nll: Tensor  # () float64
    num_grounded: Tensor  # () float64
    gains: Tensor  # (2, BINS) float64: p - q of the targets behind an image, see gain.py

    def detached(self) -> Tensor:
        """(8 + 2 BINS,) float64, in the order of the fields; addable over micro-batches and ranks."""
        return torch.cat([value.detach().double().view(-1) for value in vars(self).values()])

    @classmethod
    def of_detached(cls, values: Tensor) -> StepSums:
        """The sums whose `detached` is `values`."""
        *numbers, gains = values.split([*[1] * (len(cls.names()) - 1), 2 * BINS])
        shaped = [*(number.squeeze(0) for number in numbers), gains.view(2, BINS)]
        return cls(**dict(zip(cls.names(), shaped, strict=True)))

    @classmethod
    def size(cls) -> int:
        """Of `detached`."""
        return len(cls.names()) - 1 + 2 * BINS

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)


def vision_features(model: Any, pixel_values: Tensor) -> Tensor:
    """(I, P, width) hidden states of the frozen tower's layer that feeds the connector, without gradient."""
    config = model.config
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    selected = states[config.vision_feature_layer]
    return selected[:, 1:] if config.vision_feature_select_strategy == "default" else selected


class StepModule(nn.Module):
    """A causal LLM or a LLaVA model together with the loss of its stage; what an engine wraps.

    Forward flow: (1) embed the tokens; (2) put the connector's image features in the image positions; (3) q by the blind
    pass, where the weights need it and the batch does not have it; (4) the decoder; (5) the head on target positions
    only; (6) the sums.
    """

    def __init__(
        self,
        model: Any,
        weighting: Weighting,
        *,
        softcap: float | None,
        num_softmax_rows: int | None,
        chunk_bytes: int | None = None,
    ):
        """
        Args:
            model: LlavaForConditionalGeneration, or a causal LLM (text only).
            softcap: the LLM's final logit soft-capping, or None.
            num_softmax_rows: rows of the head that take part in the softmax, or None for all.
            chunk_bytes: see TargetScorer.
        """
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.num_softmax_rows = num_softmax_rows
        head = model.get_output_embeddings()
        self.scorer = TargetScorer(head, softcap=softcap, num_rows=num_softmax_rows, chunk_bytes=chunk_bytes)
        self.is_vlm = isinstance(model, LlavaForConditionalGeneration)

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model if self.is_vlm else self.model.base_model

    def num_slots(self, batch: Batch) -> int:
        """Positions that the decoder computes for `batch`, padding and filler included."""
        return num_slots(batch, self.decoder.config)

    def forward(self, batch: Batch) -> StepSums:
        if batch.sample is not None and takes_one_row(self.decoder.config):
            batch = in_one_row(batch)
        row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)  # (N,) each
        target = batch.labels[row, column]
        embeds = self._embed(batch)
        positions = positions_of(batch)
        sample = row if batch.sample is None else batch.sample[row, column].long()
        asks = self.weighting.kind != "uniform"
        if asks:  # before the forward, of which q needs nothing: what waits for the GPU waits for little
            # Before its first image a sample's p and q are the same.
            pictured = apart(batch)[2].cumsum(1)[sample, positions[row, column]] > 0
            blind, has_blind = self._blind_scores(batch, row, column, pictured)
        mask = attention_mask_of(batch, self.decoder.config, embeds.dtype)
        with only_read(self.decoder, row, column - 1, batch.labels.shape):
            hidden = self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        seen = self.scorer.score(hidden[row, column - 1], target)  # the first of a sample is no target

        gains = torch.zeros(2, BINS, dtype=torch.float64, device=hidden.device)
        grounded = batch.grounded[row, column]
        if not asks:
            raw = torch.ones_like(seen.log_prob)
            weight = raw
        else:
            # Without an image before it p and q are the same number: the weight is the clamp of 0, not of rounding noise.
            blind.log_prob = torch.where(pictured, blind.log_prob, seen.log_prob.detach())
            blind.logit = torch.where(pictured, blind.logit, seen.logit.detach())
            raw = raw_weights(seen, blind, has_blind, self.weighting)
            turn = sample * MOST_TURNS + batch.turn[row, column]
            weight = smooth_within_turn(raw, turn, self.weighting.window)
            gains = counted(probability_gain(seen, blind, has_blind), grounded, pictured)

        nll = -seen.log_prob
        # hidden's zero keeps the graph whole in a micro-batch without targets.
        loss = (weight * nll).sum() + 0.0 * hidden[:, 0].float().sum()
        with torch.no_grad():
            return StepSums(
                loss=loss,
                weight=weight.double().sum(),
                nll=nll.double().sum(),
                at_lower=(raw <= self.weighting.lower).double().sum(),
                at_upper=(raw >= self.weighting.upper).double().sum(),
                grounded_weight=torch.where(grounded, weight.double(), 0.0).sum(),
                grounded_nll=torch.where(grounded, nll.double(), 0.0).sum(),
                num_grounded=grounded.double().sum(),
                gains=gains,
            )

    def _embed(self, batch: Batch) -> Tensor:
        """(B, T, D) embeddings with the image features in place. Every rank runs tower and connector, image or not."""
        embeds = self.model.get_input_embeddings()(batch.input_ids)
        if not self.is_vlm:
            return embeds
        num_images = batch.pixel_values.shape[0]
        weight = self.model.model.multi_modal_projector.linear_1.weight
        pixels = batch.pixel_values.to(weight.dtype)
        if num_images == 0:
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        features = self.model.model.multi_modal_projector(vision_features(self.model, pixels))
        num_positions, num_features = int(batch.image_mask.sum()), num_images * features.shape[1]
        if num_positions != num_features:
            raise ValueError(
                f"expected as many image positions as image features, found {num_positions} positions and "
                f"{num_features} features ({num_images} images of {features.shape[1]})"
            )
        if num_images == 0:
            return embeds + 0.0 * features.sum().to(embeds.dtype)
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), features.to(embeds.dtype))

    def _blind_scores(
        self, batch: Batch, row_N: Tensor, column_N: Tensor, pictured_N: Tensor
    ) -> tuple[TargetScores, Tensor]:
        """Of each target, and whether any text comes before it: what the batch has of them, else by a blind pass of the
        `pictured_N`, 0 and True of the others."""
        if batch.log_q is not None and batch.blind_logit is not None:
            blind = TargetScores(batch.log_q[row_N, column_N], batch.blind_logit[row_N, column_N])
            return blind, blind.log_prob > -torch.inf
        row, column = row_N[pictured_N], column_N[pictured_N]
        sample = row if batch.sample is None else batch.sample[row, column].long()
        asked = sample, positions_of(batch)[row, column], batch.labels[row, column]
        return spread(*self._blind(batch, *asked), pictured_N)

    @torch.no_grad()
    def _blind(self, batch: Batch, sample: Tensor, position: Tensor, target: Tensor) -> tuple[TargetScores, Tensor]:
        """Scores of the target at `position` of `sample` without the image, from the last text token before it, and
        whether there is one. No text is passed of samples without such targets, or behind the last of them; a pass of
        one dummy token is left where there are none at all, as other ranks may wait for it (ZeRO-3)."""
        training = self.training
        self.eval()  # q is the model's answer, not one under dropout
        try:
            ids, mask, image = apart(batch)
            before = text_before(mask, image)[sample, position]  # text tokens before the target: the last predicts it
            lengths = before.new_zeros(len(ids)).scatter_reduce_(0, sample, before, "amax").tolist()
            layout = layout_of(lengths, self.decoder.config)
            text = drop_images(ids, mask, image, lengths=lengths, layout=layout)
            embeds = self.model.get_input_embeddings()(text.input_ids)
            row, start = (torch.tensor(x, device=ids.device)[sample] for x in starts(layout, lengths))
            column = start + (before - 1).clamp(min=0)
            with only_read(self.decoder, row, column, text.input_ids.shape):
                hidden = self.decoder(
                    inputs_embeds=embeds,
                    attention_mask=attention_argument(text, self.decoder.config, embeds.dtype),
                    position_ids=text.position_ids,
                    use_cache=False,
                ).last_hidden_state
            scores = self.scorer.score(hidden[row, column], target)
        finally:
            self.train(training)
        return scores, before > 0


def spread(scores: TargetScores, has_N: Tensor, asked_N: Tensor) -> tuple[TargetScores, Tensor]:
    """Scores of the targets that were asked for, (N,) among all: 0 and True of the others."""
    spread = (torch.zeros(asked_N.shape, dtype=x.dtype, device=x.device) for x in (scores.log_prob, scores.logit))
    log_prob, logit = (
        zeros.masked_scatter_(asked_N, x) for zeros, x in zip(spread, (scores.log_prob, scores.logit), strict=True)
    )
    return TargetScores(log_prob, logit), torch.ones_like(asked_N).masked_scatter_(asked_N, has_N)
