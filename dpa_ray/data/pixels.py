"""How does an RGB image become the numbers that the tower is given? As the image processor does it, to the last bit.

The processor itself turns every image into an array, back into an image to resize it, and into float64 to normalise it.
Here Pillow's own operations do the geometry on the decoded image, and a table of 3 x 256 values, made by the processor,
does the rest, once the bytes are where the model is. A photo of 640 x 480 to 336: about 4 ms of CPU instead of 6.

Measured and not used, because pixels would change. torch's resize (0.6 ms instead of 3.6) rounds weights otherwise and
always filters rows first, which Pillow does not: on noise, up to 19 of 255 levels off. Pillow's `box`, to filter the
cropped part alone: 22 levels. Decoding at a reduced size (draft mode) gives other pixels altogether. simplejpeg and
OpenCV decode the same pixels as Pillow within 15 % of its time: not worth a second opinion on what is broken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpa_ray.batch import apply_table


@dataclass(frozen=True)
class Geometry:
    """What batches need of an image processor. To unpickle the processor itself takes seconds of imports, in every process
    that makes them."""

    do_pad: bool
    image_mean: tuple[float, ...]
    size: dict[str, int]
    resample: int
    do_center_crop: bool
    crop_size: dict[str, int]
    table: torch.Tensor = field(compare=False)  # see `table`

    @classmethod
    def of(cls, image_processor: Any) -> Geometry:
        if isinstance(image_processor, Geometry):
            return image_processor
        p = image_processor
        size, crop_size = ({k: int(v) for k, v in dict(s or {}).items() if v} for s in (p.size, p.crop_size))
        return cls(
            bool(p.do_pad), tuple(p.image_mean), size, int(p.resample), bool(p.do_center_crop), crop_size, table(p)
        )


def pixels(image: Image.Image, image_processor: Any) -> np.ndarray:
    """(C, H, W) float32 of an RGB image: what `image_processor` (a LlavaImageProcessorPil) makes of it."""
    return apply_table(torch.from_numpy(levels(image, image_processor))[None], table(image_processor))[0].numpy()


def levels(image: Image.Image, image_processor: Any) -> np.ndarray:
    """(C, H, W) uint8: an RGB image padded, resized and cropped as a LlavaImageProcessorPil says, not yet normalised."""
    p = image_processor
    if p.do_pad:
        image = _padded_to_square(image, tuple(int(mean * 255) for mean in p.image_mean))
    size = p.size
    if size.get("shortest_edge"):
        short = size["shortest_edge"]
        scaled = int(short * max(image.size) / min(image.size))  # rounded as transformers does
        width, height = (short, scaled) if image.width <= image.height else (scaled, short)
    else:
        width, height = size["width"], size["height"]
    image = image.resize((width, height), Image.Resampling(p.resample))
    if p.do_center_crop:
        left, top = (width - p.crop_size["width"]) // 2, (height - p.crop_size["height"]) // 2
        image = image.crop((left, top, left + p.crop_size["width"], top + p.crop_size["height"]))
    return np.stack([np.asarray(band) for band in image.split()])


def table(image_processor: Any) -> torch.Tensor:
    """(C, 256) float32: what the processor's rescaling and normalising make of each level of each channel."""
    shades = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    out = image_processor.normalize(
        image_processor.rescale(shades, image_processor.rescale_factor),
        image_processor.image_mean,
        image_processor.image_std,
    )
    return torch.from_numpy(np.ascontiguousarray(out[:, 0], dtype=np.float32))


def pixel_shape(image_processor: Any) -> tuple[int, int, int]:
    """(C, H, W) of what `pixels` gives, known without an image; (3, 0, 0) without an image processor."""
    if image_processor is None:
        return (3, 0, 0)
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return (3, int(size["height"]), int(size["width"]))


def _padded_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
