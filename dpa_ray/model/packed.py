"""Several samples in one row: how is attention kept inside each, and where does each begin?

transformers finds packed samples by itself where positions restart, no mask and no cache are given: that is exact, but
silent where it does not (an attention mask, a cache, under flash attention more than one row). So masks are made here
where they can be, and flash attention, which takes none, is given one row.
Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dpa_ray.batch import IGNORE_INDEX, NO_SAMPLE, Batch

Mask = Tensor | BlockMask


def positions_of(batch: Batch) -> Tensor:
    """(B, T) int64: 0, 1, ... in each sample; packed, on the padding behind the last one too."""
    index = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand(batch.input_ids.shape)
    if batch.sample is None:
        return index
    starts = torch.ones_like(batch.sample, dtype=torch.bool)
    starts[:, 1:] = batch.sample[:, 1:] != batch.sample[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def apart(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids`, `attention_mask` and `image_mask` with a row for each sample, right-padded: what they were unpacked."""
    if batch.sample is None:
        return batch.input_ids, batch.attention_mask, batch.image_mask
    real = batch.sample != NO_SAMPLE
    row, column = batch.sample[real].long(), positions_of(batch)[real]
    shape = (int(row.max()) + 1, int(column.max()) + 1) if len(row) else (1, 1)

    def spread(values: Tensor) -> Tensor:
        rows = values.new_zeros(shape)
        rows[row, column] = values[real]
        return rows

    return spread(batch.input_ids), spread(batch.attention_mask), spread(batch.image_mask)


def alone(batch: Batch, number: int) -> Batch:
    """The batch of one of `batch`'s samples (counted as in `rows`, fillers behind them), without padding."""
    if batch.sample is None:
        own = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        own[number] = batch.attention_mask[number].bool()
    else:
        own = batch.sample == number
    # the image that fills each image position: they stand one behind the other, row by row
    num_images, num_features = batch.pixel_values.shape[0], int(batch.image_mask.sum())
    image = (batch.image_mask.flatten().cumsum(0) - 1).view(own.shape) // max(1, num_features // max(1, num_images))
    fields: dict[str, Any] = {
        name: value[own].unsqueeze(0)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.shape == own.shape and name != "sample"
    }
    is_real = number < len(batch.rows)
    fields |= {name: getattr(batch, name)[number : number + 1] for name in ("rows", "ids", "places")}
    return replace(
        batch, **fields, sample=None, pixel_values=batch.pixel_values[image[own & batch.image_mask].unique()],
        num_samples=int(is_real), num_tokens=int(own.sum()) if is_real else 0,
        num_targets=int((fields["labels"] != IGNORE_INDEX).sum()), untaught=[], num_skipped=0,
    )  # fmt: skip


def takes_one_row(config: Any) -> bool:
    """Does the decoder's attention find packed samples by their positions only, in a single row (flash attention)?"""
    return "flash" in (config._attn_implementation or "")


def in_one_row(batch: Batch) -> Batch:
    """A packed batch without its padding, all samples in one row; every (B, T) tensor becomes (1, tokens)."""
    assert batch.sample is not None
    real = batch.attention_mask.bool()
    rows: dict[str, Any] = {
        name: value[real].unsqueeze(0)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.shape == real.shape
    }
    return replace(batch, **rows)


def num_slots(batch: Batch, config: Any) -> int:
    """Positions that the decoder computes for `batch`, padding and filler included."""
    if batch.sample is not None and takes_one_row(config):
        return int(batch.attention_mask.sum())
    return batch.input_ids.numel()


def attention_mask_of(batch: Batch, config: Any, dtype: torch.dtype) -> Mask | dict[str, Mask] | None:
    """The `attention_mask` to call a transformers decoder with on a batch, packed or right-padded; arguments as of
    `block_masks`. Causal attention never looks at the padding behind a sample: without a mask it computes half a square."""
    if batch.sample is not None:
        return block_masks(batch, config, dtype)
    return batch.attention_mask if takes_one_row(config) else torch.ones_like(batch.attention_mask)


def block_masks(batch: Batch, config: Any, dtype: torch.dtype) -> Mask | dict[str, Mask] | None:
    """The `attention_mask` to call a transformers decoder with on a packed batch; None for flash attention.

    Args:
        config: the decoder's config (`layer_types`, `sliding_window`, attention implementation).
        dtype: of the model.
    """
    if takes_one_row(config):
        return None
    assert batch.sample is not None
    sample = batch.sample
    index = torch.arange(sample.shape[1], device=sample.device)
    distance = index.unsqueeze(1) - index.unsqueeze(0)  # (T, T): query minus key; inside a sample, of positions too
    # Padding sees padding, so that no row is masked whole.
    visible = (sample.unsqueeze(2) == sample.unsqueeze(1)) & (distance >= 0)
    return by_layer_type(config, visible, lambda window: visible & (distance < window), dtype)


def by_layer_type(
    config: Any, full: Tensor, within: Callable[[int], Tensor], dtype: torch.dtype
) -> Mask | dict[str, Mask]:
    """Masks for each kind of layer that `config` has: 4-D float ones (exact under sdpa and eager; bool ones only under
    sdpa), or for flex attention, which skips the blocks of 128 x 128 that nobody sees, its own.

    Args:
        full: (B, T, T) bool, what each query sees; within: the same, of a sliding window of so many positions.
    """

    def mask_of(visible: Tensor) -> Mask:
        return _as_blocks(visible) if config._attn_implementation == "flex_attention" else _as_float(visible, dtype)

    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if layer_types is None:
        return mask_of(full if window is None else within(window))
    masks = {}
    if "sliding_attention" in layer_types:
        masks["sliding_attention"] = mask_of(full if window is None else within(window))
    if "full_attention" in layer_types:
        masks["full_attention"] = mask_of(full)
    return masks


def _as_float(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _as_blocks(visible: Tensor) -> BlockMask:
    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[row, query, key]

    num_rows, length, _ = visible.shape
    return create_block_mask(seen, num_rows, None, length, length, device=str(visible.device))
