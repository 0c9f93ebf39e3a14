"""q, the probability of each target without the image: the short blind pass, live and as a job's kernel.

The image tokens are dropped and the text keeps the positions that it has beside them. For every text position that is
the same attention as masking the image keys (checked by a test), at the cost of the text alone. Two traps:
transformers takes a jump in `position_ids` for a packing boundary unless an attention mask is passed; and a
sliding window counts indices, not positions, so that beyond the window masks by position are needed.
Shape letters: B samples, T positions with the image, S positions of the text alone, R rows of packed texts, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpa_ray.model.packed import by_layer_type, takes_one_row
from dpa_ray.model.score import TargetScorer


@dataclass
class TextOnly:
    """A micro-batch without its image tokens, and where each position went."""

    input_ids: Tensor  # (B, S) int64, right-padded with 0 (a lone sample by one column at least)
    position_ids: Tensor  # (B, S) int64: the positions that the tokens have beside the image
    attention_mask: Tensor  # (B, S) int64
    index_BT: Tensor  # (B, T) int64: number of text tokens before position t in its sample


def drop_images(input_ids: Tensor, attention_mask: Tensor, image_mask: Tensor) -> TextOnly:
    """The text tokens of each sample, moved together; all arguments are (B, T)."""
    keep = attention_mask.bool() & ~image_mask
    rank = keep.long().cumsum(1)
    num_text = int(rank[:, -1].max())
    batch = input_ids.shape[0]
    row, column = keep.nonzero(as_tuple=True)
    target = rank[row, column] - 1
    # On the way to flash attention transformers drops a mask that masks nothing, and then looks for packing in the
    # positions of a lone sample after all: one column of padding keeps its mask.
    short_ids = input_ids.new_zeros(batch, max(num_text, 1) + (batch == 1))
    positions, mask = torch.zeros_like(short_ids), torch.zeros_like(short_ids)
    short_ids[row, target] = input_ids[row, column]
    positions[row, target] = column
    mask[row, target] = 1
    # A sample that is nothing but image has no row to attend to; one dummy token keeps the softmax finite.
    mask[:, 0] = 1
    return TextOnly(short_ids, positions, mask, rank - keep.long())


def sliding_window_of(config: Any) -> int | None:
    """Positions that a sliding layer of the decoder sees, or None where no layer slides."""
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) if slides else None


def attention_argument(text: TextOnly, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` to call a transformers decoder with: 2-D, or 4-D masks by position where a window matters.

    Args:
        config: the decoder's config (`layer_types`, `sliding_window`).
        dtype: of the model.
    """
    window = sliding_window_of(config)
    if window is None or int(text.position_ids.max()) < window:
        return text.attention_mask
    distance = text.position_ids.unsqueeze(2) - text.position_ids.unsqueeze(1)  # (B, S, S): query minus key
    index = torch.arange(text.input_ids.shape[1], device=distance.device)
    visible = (index.unsqueeze(0) <= index.unsqueeze(1)) & text.attention_mask.bool().unsqueeze(1)
    # A padding row sees itself, so that no row is masked whole.
    own = torch.eye(len(index), dtype=torch.bool, device=distance.device)
    return by_layer_type(config, visible | own, lambda size: (visible & (distance < size)) | own, dtype)


@dataclass
class TextSample:
    """One sample without its image tokens."""

    input_ids: np.ndarray  # (S,) int64
    position_ids: np.ndarray  # (S,) int64, rising: the positions that the tokens have beside the image
    targets: np.ndarray  # (N,) int64: indices of the targets in input_ids


def text_of(input_ids: np.ndarray, target: np.ndarray, image_token_id: int) -> TextSample:
    """The text of an encoded sample; `input_ids` (T,) int64 and `target` (T,) bool as in `Encoded`."""
    position_ids = np.flatnonzero(input_ids != image_token_id)
    return TextSample(input_ids[position_ids], position_ids, np.flatnonzero(target[position_ids]))


def row_width(config: Any) -> int:
    """How wide a row of packed texts is at most, but for a longer sample alone: masked attention computes the whole
    square of a row, 4 T D operations a token against 24 D^2 of the linear layers, here a sixth of them at most."""
    return int(min(1024, max(128, config.hidden_size)))


@torch.no_grad()
def packed_scores(
    llm: Any, samples: Sequence[TextSample], layout: Sequence[Sequence[int]], *, softcap: float | None,
    num_rows: int | None,
) -> list[np.ndarray]:  # fmt: skip
    """(2, N) float32 of each sample: log q and logit of its targets, -inf and 0 of one that no text comes before.

    Args:
        llm: a causal LLM in eval mode.
        layout: the numbers of the samples in each row, each in one place; under flash attention, which takes no mask of
            blocks, one in a row.
        softcap, num_rows: as of `TargetScorer`.
    """
    device = llm.get_input_embeddings().weight.device
    config = llm.base_model.config
    alone = takes_one_row(config)
    places = [[n] for n in range(len(samples))] if alone else layout
    # one column more: see drop_images
    shape = (len(places), max(sum(len(samples[n].input_ids) for n in row) for row in places) + alone)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    number = np.full(shape, -1)
    starts = {}
    for r, row in enumerate(places):
        start = 0
        for n in row:
            place = slice(start, start + len(samples[n].input_ids))
            ids[r, place], positions[r, place], number[r, place] = samples[n].input_ids, samples[n].position_ids, n
            starts[n], start = (r, start), place.stop
    ids_RS, positions_RS, number_RS = (torch.from_numpy(x).to(device) for x in (ids, positions, number))
    embeds = llm.get_input_embeddings()(ids_RS)
    mask: Tensor | dict[str, Tensor]
    if alone:
        mask = attention_argument(TextOnly(ids_RS, positions_RS, (number_RS >= 0).long(), ids_RS), config, embeds.dtype)
    else:
        mask = _blocks(positions_RS, number_RS, config, embeds.dtype)
    hidden = llm.base_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions_RS, use_cache=False
    ).last_hidden_state

    known = [(n, int(t)) for n, sample in enumerate(samples) for t in sample.targets if t > 0]
    row_N = torch.tensor([starts[n][0] for n, _ in known], dtype=torch.long, device=device)
    column_N = torch.tensor([starts[n][1] + t for n, t in known], dtype=torch.long, device=device)
    scorer = TargetScorer(llm.get_output_embeddings(), softcap=softcap, num_rows=num_rows)
    found = scorer.score(hidden[row_N, column_N - 1], ids_RS[row_N, column_N])
    scores = torch.stack([found.log_prob, found.logit]).cpu()
    return _by_sample(samples, scores.numpy())


def _blocks(positions: Tensor, number_of: Tensor, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Each text sees itself alone, a sliding layer of it by positions; padding sees padding."""
    index = torch.arange(positions.shape[1], device=positions.device)
    visible = (number_of.unsqueeze(2) == number_of.unsqueeze(1)) & (index.unsqueeze(1) >= index.unsqueeze(0))
    distance = positions.unsqueeze(2) - positions.unsqueeze(1)
    return by_layer_type(config, visible, lambda window: visible & (distance < window), dtype)


def _by_sample(samples: Sequence[TextSample], scores: np.ndarray) -> list[np.ndarray]:
    parts, start = [], 0
    for sample in samples:
        has = sample.targets > 0
        part = np.zeros((2, len(has)), np.float32)
        part[0] = -np.inf
        part[:, has] = scores[:, start : start + int(has.sum())]
        start += int(has.sum())
        parts.append(part)
    return parts
