"""What do image files look like that cannot be used? One of each kind: reason, file name, bytes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
FRAMES = [Image.new("RGB", (9, 9), (60 * i, 0, 0)) for i in range(3)]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
FRAMED = ("GIF", "PNG", "WEBP", "AVIF")


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of `image` in a format of Pillow's."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with the checksum that it must have."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, pixels: bytes = b"", before: bytes = b"") -> bytes:
    """A greyscale PNG that claims a size, with any content."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    body = before + png_chunk(b"IDAT", pixels or zlib.compress(bytes(8))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _jpeg(width: int, height: int) -> bytes:
    data = saved(PICTURE, "JPEG")
    return _patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def _ico(inner: bytes) -> bytes:
    """An icon whose directory says 16 x 16, whatever the picture in it is."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def _bmp(width: int, height: int) -> bytes:
    return _patched(saved(PICTURE, "BMP"), 18, struct.pack("<ii", width, height))


def _gif(width: int, height: int) -> bytes:
    return _patched(saved(PICTURE, "GIF"), 6, struct.pack("<HH", width, height))


def _tiff(width: int, height: int, compression: int = 1) -> bytes:
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: height, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(values)) + entries + bytes(4)


def _webp(width: int, height: int) -> bytes:
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + b"".join((n - 1).to_bytes(3, "little") for n in (width, height))
    body = b"WEBP" + canvas + saved(PICTURE, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg2000(width: int, height: int) -> bytes:
    data = saved(PICTURE, "JPEG2000")
    return _patched(data, data.index(b"ihdr") + 4, struct.pack(">II", height, width))


def _one_wide(form: str) -> bytes:
    return saved(Image.new("RGB", (1, 201)), form)


def _animated(form: str) -> bytes:
    return saved(FRAMES[0], form, save_all=True, append_images=FRAMES[1:])


NOISE = bytes((37 * i * i + 11 * i) % 251 for i in range(3000))
GOOD_PNG, GOOD_JPEG = saved(PICTURE, "PNG"), saved(PICTURE, "JPEG")
TEXT_BOMB = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 * 2**20)))

FILES: list[tuple[str, str, bytes]] = [
    ("image_empty", "empty.png", b""),
    ("image_empty", "empty.jpg", b""),
    *[("image_truncated", f"half.{form}", saved(PICTURE, form)[: len(saved(PICTURE, form)) // 2]) for form in FORMATS],
    *[("image_truncated", f"most.{form}", saved(PICTURE, form)[: len(saved(PICTURE, form)) * 9 // 10]) for form in FORMATS],
    *[("image_truncated", f"start.{form}", saved(PICTURE, form)[:16]) for form in FORMATS],
    ("image_truncated", "no_end_marker.jpg", GOOD_JPEG[:-2]),
    ("image_truncated", "marker_only.jpg", b"\xff\xd8\xff"),
    ("image_not_an_image", "page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    ("image_not_an_image", "denied.png", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    ("image_not_an_image", "answer.json.jpg", b'{"error": "rate limit"}'),
    ("image_not_an_image", "drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'),
    ("image_not_an_image", "pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    ("image_not_an_image", "paper.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"),
    ("image_not_an_image", "script.eps", saved(PICTURE, "EPS")),
    ("image_not_an_image", "sound.webp", b"RIFF\x24\x08\0\0WAVEfmt " + bytes(2000)),
    ("image_not_an_image", "film.avi", b"RIFF\x24\x08\0\0AVI LIST" + bytes(2000)),
    ("image_not_an_image", "film.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(200)),
    ("image_not_an_image", "phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)),
    ("image_not_an_image", "archive.jpg", b"PK\3\4" + bytes(200)),
    ("image_not_an_image", "packed.jpg", b"\x1f\x8b\x08" + bytes(200)),
    ("image_not_an_image", "array.png", b"\x93NUMPY\1\0" + bytes(200)),
    ("image_not_an_image", "zeros.png", bytes(5000)),
    ("image_not_an_image", "noise.jpg", NOISE),
    ("image_not_an_image", "letters.png", b"aGVsbG8gd29ybGQ=" * 20),
    ("image_not_an_image", "shifted.png", b"\n" + GOOD_PNG),
    ("image_not_an_image", "one_byte.png", b"x"),
    ("image_not_an_image", "newline.png", b"\n"),
    ("image_corrupt", "scrambled.png", _patched(GOOD_PNG, 200, NOISE[:900])),
    ("image_corrupt", "checksum.png", _patched(GOOD_PNG, 29, b"\0\0\0\0")),
    ("image_corrupt", "text_bomb.png", png(2, 2, before=TEXT_BOMB)),
    ("image_corrupt", "unknown_compression.tiff", _tiff(4, 2, compression=999)),
    ("image_corrupt", "not_webp_inside.webp", b"RIFF" + struct.pack("<I", 3012) + b"WEBPVP8 " + struct.pack("<I", 3000) + NOISE),
    ("image_corrupt", "scrambled.ico", _ico(_patched(GOOD_PNG, 200, NOISE[:900]))),
    ("image_corrupt", "no_width.png", png(0, 5)),
    ("image_corrupt", "no_tables.jpg", GOOD_JPEG.replace(b"\xff\xdb", b"\xff\xfe")),
    ("image_bomb", "bomb.png", png(60_000, 60_000)),
    ("image_bomb", "twice.png", png(10_000, 10_000)),
    ("image_bomb", "bomb.jpg", _jpeg(65_000, 65_000)),
    ("image_bomb", "bomb.gif", _gif(65_000, 65_000)),
    ("image_bomb", "bomb.bmp", _bmp(65_000, 65_000)),
    ("image_bomb", "bomb.tiff", _tiff(65_000, 65_000)),
    ("image_bomb", "bomb.webp", _webp(16_000, 16_000)),
    ("image_bomb", "bomb.jp2", _jpeg2000(65_000, 65_000)),
    ("image_bomb", "bomb.ppm", b"P6 60000 60000 255\n" + bytes(99)),
    ("image_bomb", "bomb.ico", _ico(png(60_000, 60_000))),
    *[("image_size", f"one_wide.{form}", _one_wide(form)) for form in FORMATS if form != "ICO"],
    ("image_size", "one_wide.ico", _ico(png(1, 201))),
    ("image_size", "one_high.png", saved(Image.new("L", (201, 1)), "PNG")),
    ("image_size", "long_side.png", png(20_000, 200)),
    ("image_size", "long_side.jpg", _jpeg(20_000, 200)),
    *[("image_animated", f"frames.{form}", _animated(form)) for form in FRAMED],
    ("image_animated", "frames_cut.gif", _animated("GIF")[:-20]),
]  # fmt: skip
