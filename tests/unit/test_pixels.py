"""Are pixels the image processor's, for every kind of tower and aspect, to the last bit?"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessorPil

from dpa_ray.batch import scaled
from dpa_ray.data.images import decode
from dpa_ray.data.pixels import levels, pixel_scale, pixel_shape, pixels
from dpa_ray.model.tower import image_processor, tower_spec
from dpa_ray.model.vlm import ModelRef

RNG = np.random.default_rng(0)
PROCESSORS = {
    "crop": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "pad": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False, do_pad=True),
    "stretch": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
    "bilinear": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False, resample=2),
    "lanczos": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False, resample=1),
}
SIZES = [(60, 40), (640, 480), (333, 500), (28, 28), (1, 50), (50, 1), (3, 9), (9, 3), (1, 1), (3, 3), (1, 200)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_the_processors(picture: Image.Image, processor: Any) -> None:
    found = pixels(picture, processor)
    expected = processor(images=[picture], return_tensors="np")["pixel_values"][0]
    assert (found.shape, found.dtype) == (pixel_shape(processor), np.float32)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_any_shape_are_the_processors(name, size):
    assert_the_processors(noise(*size), PROCESSORS[name])


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_pixels_are_the_processors_of_every_kind_of_tower(
    tiny_tower: Callable[..., Path], pictures: list[Any], kind, aspect
):
    ref = ModelRef(str(tiny_tower(kind)))
    processor = image_processor(ref, tower_spec(ref, -2, None), aspect)
    for picture in [*(p.convert("RGB") for p in pictures), noise(640, 480)]:
        assert_the_processors(picture, processor)


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, 1 / 256])
def test_levels_scaled_at_the_model_are_the_processors_to_the_last_bit(factor):
    """All 256 of every channel: the processor multiplies in float64 and rounds, `scaled` divides in float32."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor = LlavaImageProcessorPil(rescale_factor=factor, image_mean=mean, image_std=std)
    shades = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    expected = processor.normalize(processor.rescale(shades, factor), mean, std)
    found = scaled(torch.from_numpy(shades.copy())[None], torch.from_numpy(pixel_scale(processor)))
    assert np.array_equal(found[0].numpy(), expected)


def test_a_column_of_one_colour_keeps_it():
    """One pixel wide: taken for channels first, its colours would be mixed up."""
    for size in ((1, 5), (5, 1), (3, 7)):
        out = levels(Image.new("RGB", size, (255, 0, 0)), PROCESSORS["stretch"])
        assert np.array_equal(out, np.broadcast_to(np.array([255, 0, 0], np.uint8)[:, None, None], out.shape))


def test_odd_files_give_what_the_processor_makes_of_the_opened_image():
    """Transparency, palette, CMYK: the exported processor, given the opened file, shows the model the same."""
    picture = noise(60, 40)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    for image, form in ((clear, "PNG"), (picture.quantize(16), "PNG"), (picture.convert("CMYK"), "JPEG")):
        file = io.BytesIO()
        image.save(file, form)
        expected = PROCESSORS["pad"](images=Image.open(file), return_tensors="np")["pixel_values"][0]
        assert np.array_equal(pixels(decode(file.getvalue()), PROCESSORS["pad"]), expected)


def test_shape_without_a_processor_and_of_other_processors():
    assert pixel_shape(None) == (3, 0, 0)
    assert pixel_shape(CLIPImageProcessor(crop_size={"height": 18, "width": 20})) == (3, 18, 20)
