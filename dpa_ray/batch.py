"""What travels from the data to the model: `Encoded` (one sample), `Batch` (one micro-batch), and their shapes.

Shape letters: B samples in a micro-batch, T positions, I images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # where batches are made, it would cost every process 1.4 s of CPU and 200 MB, and do nothing
    import torch

IMAGE_TOKEN = "<image>"
"""The placeholder in texts, and the name of its row in the tokenizer."""

IGNORE_INDEX = -100
"""Label of a position that is no target (torch's and transformers' convention)."""

NO_TURN = -1
"""`turn` of a position that is no target."""

NO_SAMPLE = -1
"""`sample` of padding."""


Arrays = dict[str, Any]
"""The fields of a Batch by name, with numpy arrays in place of tensors."""


@dataclass
class Encoded:
    """One sample as token ids. The image placeholder is already repeated once per image feature."""

    input_ids: np.ndarray  # (T,) int64
    target: np.ndarray  # (T,) bool: is this token predicted from the ones before it, and trained on? never at 0
    turn: np.ndarray  # (T,) int32: which assistant turn a target belongs to (0, 1, ...); NO_TURN elsewhere
    grounded: np.ndarray  # (T,) bool: is the token part of a word that the image shows? all False where unknown
    num_images: int  # images whose span is in input_ids (a span that truncation would cut is left out whole)
    truncated: bool = False
    blind: np.ndarray | None = (
        None  # (2, T) float32 if computed beforehand: log q and logit of each target, 0 elsewhere
    )


@dataclass
class Batch:
    """One micro-batch, right-padded: a sample a row, or (`sample` given) several, packed one behind the other.

    Filler samples only keep ranks in step: no targets, in no count.
    """

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64: 1 on real tokens, 0 on padding
    labels: torch.Tensor  # (B, T) int64: the token id where it is a target, else IGNORE_INDEX
    turn: torch.Tensor  # (B, T) int32
    grounded: torch.Tensor  # (B, T) bool
    image_mask: torch.Tensor  # (B, T) bool: positions that an image feature fills
    pixel_values: torch.Tensor  # (I, C, H, W), in the order of their spans, I = 0 in a text-only batch: float32, or
    # on their way uint8 levels, which `to` makes float32 by pixel_scale
    num_samples: int  # real samples, filler left out
    num_tokens: int  # real tokens, image tokens included; filler and padding left out
    num_targets: int
    rows: list[tuple[str, int]] = field(default_factory=list)  # (data digest, row) of the real samples
    ids: list[str | None] = field(default_factory=list)  # their `id` in the source, which may repeat or be absent
    places: list[str] = field(default_factory=list)  # where each stands in the source, for people
    sample: torch.Tensor | None = (
        None  # (B, T) int32, packed: number of the position's sample in the batch, or NO_SAMPLE
    )
    log_q: torch.Tensor | None = (
        None  # (B, T) float32, where q was computed beforehand: of each target without the image,
    )
    # -inf where no text comes before it; 0 elsewhere
    blind_logit: torch.Tensor | None = None  # (B, T) float32, with log_q
    pixel_scale: torch.Tensor | None = None  # (3, C) float32, where pixel_values are levels: see `scaled`
    untaught: list[tuple[int, str | None, str]] = field(
        default_factory=list
    )  # (row, id, place) of those without target
    num_skipped: int = 0  # real samples that the recipe passes over: a token without target stands for each

    @classmethod
    def of(cls, arrays: Arrays) -> Batch:
        """The batch of `arrays`, in their memory."""
        import torch

        values: Arrays = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        return cls(**values)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, and there with pixel values of float32."""
        import torch

        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        if self.pixel_scale is not None:  # a quarter of the bytes have crossed processes and the bus
            moved["pixel_values"] = scaled(moved["pixel_values"], moved.pop("pixel_scale"))
        return Batch(**{**vars(self), "pixel_scale": None, **moved})


def scaled(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(I, C, H, W) float32 of `levels` (I, C, H, W) uint8: (level / divisor - mean) / std, by the rows of `scale` (3, C)."""
    divisor, mean, std = scale[:, :, None, None]  # tensors: CUDA multiplies by the inverse of a number, an ulp off
    return levels.float().div_(divisor).sub_(mean).div_(std)
