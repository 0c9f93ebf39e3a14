"""Do odd files become the right image, and broken ones an error with the right reason?"""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dpa_ray.data.images import ImageError, check, decode

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    check(data)
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has a few bytes of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# -- ordinary variety


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_out_exactly(form):
    assert np.array_equal(rgb(saved(PICTURE, form)), np.asarray(PICTURE))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF", "AVIF", "JPEG2000", "ICO"])
def test_other_formats_decode(form):
    assert rgb(saved(PICTURE, form)).ndim == 3


def test_cmyk_becomes_the_colours_it_shows():
    red = rgb(saved(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95))
    assert abs(red.astype(int) - (255, 0, 0)).max() < 12  # JPEG's loss


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_put_on_white(mode):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 200, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    shown = rgb(saved(image.convert(mode) if mode != "PA" else image.quantize(8), "PNG"))
    assert shown[3, 3].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == [127, 127, 127]


def test_a_palette_with_transparent_colour_is_put_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        shown = rgb(saved(image, form, transparency=0))
        assert shown[0, 0].tolist() == [255, 255, 255]
        assert shown[0, 1].tolist() == [0, 0, 255]


def test_greyscale_of_1_8_and_16_bits():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    deep = rgb(saved(Image.fromarray(grey), "PNG"))
    assert np.array_equal(deep[..., 0], np.rint(grey / 257).astype(np.uint8))
    assert rgb(saved(Image.fromarray(np.full((2, 2), 77, np.uint8)), "PNG"))[0, 0].tolist() == [77, 77, 77]
    assert rgb(saved(Image.new("1", (3, 3), 1), "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_float_greyscale_from_0_to_1_uses_the_whole_range():
    shown = rgb(saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"))
    assert (shown.min(), shown.max()) == (0, 255)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it upright
    data = saved(PICTURE, "JPEG", exif=exif)
    assert decode(data).size == (40, 60)
    assert np.array_equal(rgb(data), np.rot90(rgb(saved(PICTURE, "JPEG")), -1))


def test_broken_exif_says_nothing():
    assert decode(saved(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (60, 40)


def test_a_photo_with_a_preview_is_not_animated():
    file = io.BytesIO()
    PICTURE.save(file, "MPO", save_all=True, append_images=[PICTURE.resize((30, 20))])
    assert decode(file.getvalue()).size == (60, 40)
    check(file.getvalue())


# -- broken ones


def reason_of(data: bytes) -> str:
    reasons = set()
    for function in (check, decode):
        with pytest.raises(ImageError) as caught:
            function(data)
        assert caught.value.detail
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.5, 0.9, 20])
def test_a_truncated_file(form, keep):
    data = saved(PICTURE, form)
    assert reason_of(data[: int(len(data) * keep) if keep < 1 else keep]) == "image_truncated"


def test_a_jpeg_without_its_last_byte_is_truncated():
    assert reason_of(saved(PICTURE, "JPEG")[:-1]) == "image_truncated"


@pytest.mark.parametrize(
    "data", [b"<html>404</html>", b"\x00" * 100, b"%PDF-1.4 ...", b"<svg></svg>", b"{}", bytes(range(256)) * 20]
)
def test_what_is_no_image(data):
    assert reason_of(data) == "image_not_an_image"


def test_postscript_is_not_run():
    assert reason_of(saved(PICTURE, "EPS")) == "image_not_an_image"


def test_empty():
    assert reason_of(b"") == "image_empty"


def test_corrupt_data_in_the_middle():
    data = bytearray(saved(PICTURE, "PNG"))
    data[200:260] = b"\xff" * 60
    assert reason_of(bytes(data)) in ("image_corrupt", "image_truncated")


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (10_000, 9_000)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    assert reason_of(png_header(*size)) == "image_bomb"


@pytest.mark.parametrize("size", [(20_000, 200), (1, 201), (4_000, 10)])
def test_sides_beyond_use(size):
    assert reason_of(png_header(*size)) == "image_size"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated(form):
    frames = [Image.new("RGB", (9, 9), (40 * i, 0, 0)) for i in range(3)]
    assert reason_of(saved(frames[0], form, save_all=True, append_images=frames[1:])) == "image_animated"


def test_an_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("image_empty", "x")))
    assert (error.reason, error.detail) == ("image_empty", "x")
