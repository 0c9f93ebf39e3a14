"""q, the probability of each target without the image: the short blind pass, live and as a job's kernel.

The image tokens are dropped and the text keeps the positions that it has beside them. For every text position that is
the same attention as masking the image keys (checked by a test), at the cost of the text alone. Two traps:
transformers takes a jump in `position_ids` for a packing boundary unless an attention mask is passed; and a
sliding window counts indices, not positions, so that beyond the window masks by position are needed.
Shape letters: B samples, T positions with the image, R rows of texts, S positions in them, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpa_ray.batch import NO_SAMPLE
from dpa_ray.model.last_layer import only_read
from dpa_ray.model.packed import Mask, by_layer_type, takes_one_row
from dpa_ray.model.score import TargetScorer
from dpa_ray.pack import pack

SAVES = 0.9
"""Rows of several texts are used where they hold less than this part of what a row for each text would: attention has a
mask then, and computes the whole square of a row."""


@dataclass
class TextRows:
    """Texts without their image tokens, one or several in a row."""

    input_ids: Tensor  # (R, S) int64, 0 on padding
    position_ids: Tensor  # (R, S) int64: the positions that the tokens have beside the image
    sample: Tensor  # (R, S) int64: number of the sample, NO_SAMPLE on padding
    several: bool  # is there a row of more than one text?

    @property
    def attention_mask(self) -> Tensor:
        """(R, S) int64."""
        return (self.sample != NO_SAMPLE).long()


def text_before(attention_mask: Tensor, image_mask: Tensor) -> Tensor:
    """(B, T) int64: number of text tokens before each position in its sample; both arguments are (B, T)."""
    text = (attention_mask.bool() & ~image_mask).long()
    return text.cumsum(1) - text


def drop_images(
    input_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, *, lengths: Sequence[int] | None = None,
    layout: Sequence[Sequence[int]] | None = None,
) -> TextRows:  # fmt: skip
    """The text tokens of each sample, moved together.

    Args:
        input_ids, attention_mask, image_mask: (B, T).
        lengths: how many text tokens of each sample are kept, from its first; all by default.
        layout: the numbers of the samples in each row; by default one sample in each.
    """
    text, rank = attention_mask.bool() & ~image_mask, text_before(attention_mask, image_mask)
    kept = text.sum(1).tolist() if lengths is None else lengths
    layout = [[n] for n in range(len(kept))] if layout is None else layout
    row_of, start_of = starts(layout, kept)
    device = input_ids.device
    row_B, start_B, length_B = (torch.tensor(x, device=device) for x in (row_of, start_of, list(kept)))
    number, column = (text & (rank < length_B.unsqueeze(1))).nonzero(as_tuple=True)
    width = max((sum(kept[n] for n in row) for row in layout), default=0)
    # On the way to flash attention transformers drops a mask that masks nothing, and then looks for packing in the
    # positions of a lone row after all: one column of padding keeps its mask.
    short_ids = input_ids.new_zeros(max(len(layout), 1), max(width, 1) + (len(layout) <= 1))
    positions, sample = torch.zeros_like(short_ids), torch.full_like(short_ids, NO_SAMPLE)
    # A row without text has nothing to attend to; one dummy token keeps the softmax finite.
    sample[:, 0] = 0
    place = row_B[number], start_B[number] + rank[number, column]
    short_ids[place], positions[place], sample[place] = input_ids[number, column], column, number
    return TextRows(short_ids, positions, sample, any(len(row) > 1 for row in layout))


def starts(layout: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Row and first column of each sample; 0 and 0 of one in no row."""
    row_of, start_of = [0] * len(lengths), [0] * len(lengths)
    for r, row in enumerate(layout):
        start = 0
        for n in row:
            row_of[n], start_of[n], start = r, start, start + lengths[n]
    return row_of, start_of


def layout_of(lengths: Sequence[int], config: Any) -> list[list[int]]:
    """Which samples with any of `lengths` tokens share a row: as few places as possible, and one each where that saves
    little or attention takes no mask of blocks."""
    asked = [n for n, length in enumerate(lengths) if length]
    alone = [[n] for n in asked]
    longest = max(lengths, default=0)
    if len(asked) < 2 or takes_one_row(config):
        return alone
    rows = pack([lengths[n] for n in asked], max(row_width(config), longest))
    width = max(sum(lengths[asked[i]] for i in row) for row in rows)
    if len(rows) * width > SAVES * len(alone) * longest:
        return alone
    return [[asked[i] for i in row] for row in rows]


def sliding_window_of(config: Any) -> int | None:
    """Positions that a sliding layer of the decoder sees, or None where no layer slides."""
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) if slides else None


def attention_argument(text: TextRows, config: Any, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """The `attention_mask` to call a transformers decoder with: 2-D, or 4-D masks by sample and position where texts
    share a row or a window matters.

    Args:
        config: the decoder's config (`layer_types`, `sliding_window`).
        dtype: of the model.
    """
    window = sliding_window_of(config)
    if not text.several and (window is None or int(text.position_ids.max()) < window):
        # Causal attention never looks at the padding behind a text: without a mask it computes half a square.
        return text.attention_mask if takes_one_row(config) else torch.ones_like(text.input_ids)
    index = torch.arange(text.sample.shape[1], device=text.sample.device)
    # Padding sees padding, so that no row is masked whole.
    same = text.sample.unsqueeze(2) == text.sample.unsqueeze(1)
    visible = same & (index.unsqueeze(1) >= index.unsqueeze(0))
    distance = text.position_ids.unsqueeze(2) - text.position_ids.unsqueeze(1)  # (R, S, S): query minus key
    return by_layer_type(config, visible, lambda size: visible & (distance < size), dtype)


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
    lengths = [len(sample.input_ids) for sample in samples]
    row_of, start_of = starts(places, lengths)
    # one column more: see drop_images
    shape = (len(places), max(sum(lengths[n] for n in row) for row in places) + alone)
    ids, positions, number = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, NO_SAMPLE)
    for n, sample in enumerate(samples):
        place = row_of[n], slice(start_of[n], start_of[n] + lengths[n])
        ids[place], positions[place], number[place] = sample.input_ids, sample.position_ids, n
    several = any(len(row) > 1 for row in places)
    ids_RS, positions_RS, number_RS = (torch.from_numpy(x).to(device) for x in (ids, positions, number))
    text = TextRows(ids_RS, positions_RS, number_RS, several)
    known = [(n, int(t)) for n, sample in enumerate(samples) for t in sample.targets if t > 0]
    row_N = torch.tensor([row_of[n] for n, _ in known], dtype=torch.long, device=device)
    column_N = torch.tensor([start_of[n] + t for n, t in known], dtype=torch.long, device=device)
    embeds = llm.get_input_embeddings()(text.input_ids)
    with only_read(llm.base_model, row_N, column_N - 1, shape):
        hidden = llm.base_model(
            inputs_embeds=embeds, attention_mask=attention_argument(text, config, embeds.dtype),
            position_ids=text.position_ids, use_cache=False,
        ).last_hidden_state  # fmt: skip
    scorer = TargetScorer(llm.get_output_embeddings(), softcap=softcap, num_rows=num_rows)
    found = scorer.score(hidden[row_N, column_N - 1], text.input_ids[row_N, column_N])
    scores = torch.stack([found.log_prob, found.logit]).cpu()
    return _by_sample(samples, scores.numpy())


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
