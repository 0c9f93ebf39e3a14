"""How does an RGB image become the numbers that the tower is given? As the image processor does it, to the last bit.

The processor itself turns every image into an array, back into an image to resize it, and into float64 to normalise it.
Here Pillow's own operations do the geometry on the decoded image, and float32 does the rest, once the bytes are where the
model is: level / 255 there is what the processor rounds to from float64. A photo of 640 x 480 to 336: about 4 ms of CPU
instead of 6.

Measured and not used, because pixels would change. torch's resize (0.6 ms instead of 3.6) rounds weights otherwise and
always filters rows first, which Pillow does not: on noise, up to 19 of 255 levels off. Pillow's `box`, to filter the
cropped part alone: 22 levels. Decoding at a reduced size (draft mode) gives other pixels altogether. simplejpeg and
OpenCV decode the same pixels as Pillow within 15 % of its time: not worth a second opinion on what is broken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


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
    scale: np.ndarray = field(compare=False)  # see `pixel_scale`

    @classmethod
    def of(cls, image_processor: Any) -> Geometry:
        if isinstance(image_processor, Geometry):
            return image_processor
        p = image_processor
        size, crop_size = ({k: int(v) for k, v in dict(s or {}).items() if v} for s in (p.size, p.crop_size))
        return cls(
            bool(p.do_pad),
            tuple(p.image_mean),
            size,
            int(p.resample),
            bool(p.do_center_crop),
            crop_size,
            pixel_scale(p),
        )


def pixels(image: Image.Image, image_processor: Any) -> np.ndarray:
    """(C, H, W) float32 of an RGB image: what `image_processor` (a LlavaImageProcessorPil) makes of it."""
    divisor, mean, std = pixel_scale(image_processor)[:, :, None, None]
    values = levels(image, image_processor).astype(np.float32)
    values /= divisor
    values -= mean
    values /= std
    return values


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


def pixel_scale(image_processor: Any) -> np.ndarray:
    """(3, C) float32: by channel, what the processor's rescaling divides by, the mean and the standard deviation."""
    p = image_processor
    return np.array([[1 / p.rescale_factor] * len(p.image_mean), p.image_mean, p.image_std], np.float32)


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
