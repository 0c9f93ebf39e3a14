"""q, the probability of each target without the image: the short blind pass.

The image tokens are dropped and the text keeps the positions that it has beside them. For every text position that is
the same attention as masking the image keys (checked by a test), at the cost of the text alone. Two traps:
transformers takes a jump in `position_ids` for a packing boundary unless an attention mask is passed; and a
sliding window counts indices, not positions, so that beyond the window masks by position are needed.
Shape letters: B samples, T positions with the image, S positions of the text alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpa_ray.model.packed import by_layer_type


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
