"""How do encoded bytes become an RGB image, and which bytes are refused?

What transformers does on its own way from a file to RGB, and nothing else: the EXIF orientation is applied (its
`load_image` does, as every viewer does: who wrote the caption saw the picture upright), transparency is put on white and
everything is made RGB (as its image processors do with PIL images); pixels.py takes over from there. Only
16-bit, 32-bit and float greyscale differ: plain conversion clips them to white, so they are scaled to 8 bits.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dpa_ray.data.image_ends import is_cut, is_image

MAX_PIXELS = 89_478_485
"""Largest width times height: Pillow's own bound for a suspected decompression bomb (256 MiB as RGB)."""

MAX_SIDE = 16_384
"""Longest side: padding to a square makes side * side pixels (768 MiB as RGB at this bound)."""

MAX_RATIO = 200
"""Largest ratio of the sides: cropping first scales the short side up, and the long one with it."""

MAX_BYTES = 256 * 2**20
"""Largest file."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
# not what Pillow opens with help from outside (EPS: ghostscript), nor what it knows by no signature (TGA)
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # in others (MPO, TIFF) further frames are previews or pages


class ImageError(Exception):
    """An image that cannot be used; `reason` is one of the quarantine's."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:  # crosses processes
        return (ImageError, (self.reason, self.detail))


def decode(data: bytes) -> Image.Image:
    """RGB image of encoded bytes, upright. Raises: ImageError with the reason where they cannot be used."""
    image = _load(data)
    form = image.format
    with contextlib.suppress(Exception):  # metadata is often broken, in as many ways; then it says no orientation
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy the image
            image = ImageOps.exif_transpose(image)
    return _rgb(image, form)


def check(data: bytes) -> None:
    """Does `data` decode to the end, to something that becomes RGB? Raises: ImageError with the reason if not."""
    image = _load(data, small=True)
    corner = image.crop((0, 0, 1, 1))
    corner.info = {}
    _rgb(corner, image.format)


def _load(data: bytes, *, small: bool = False) -> Image.Image:
    """The decoded image as it is stored; with `small`, a JPEG at an eighth of its size (all of its bytes are read)."""
    if not data:
        raise ImageError("image_empty", "expected an image, found 0 bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("image_size", f"expected at most {MAX_BYTES} bytes, found {len(data)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about bombs (checked here) and odd metadata
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(image)
            if small and image.format == "JPEG":
                image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Image.DecompressionBombError as err:
        raise ImageError("image_bomb", str(err)) from None
    except UnidentifiedImageError:
        if is_image(data):
            reason = "image_corrupt" if is_cut(data) is False else "image_truncated"
            raise ImageError(reason, f"an image's first bytes, but no header in all {len(data)}") from None
        raise ImageError("image_not_an_image", f"{len(data)} bytes that begin with {data[:16]!r}") from None
    except MemoryError as err:
        raise ImageError("image_bomb", f"not enough memory to decode it {err}") from None
    except Exception as err:  # decoders raise what they like at broken data: SyntaxError, struct.error, zlib.error
        if isinstance(err, ImageError):
            raise
        text = f"{type(err).__name__}: {err}"
        if data.startswith(b"RIFF") or data[4:8] in (b"ftyp", b"jP  "):  # decoders that give no reason
            cut = is_cut(data)
        else:
            cut = any(w in text.lower() for w in ("truncat", "unexpected end", "eof", "incomplete", "not enough"))
        raise ImageError("image_truncated" if cut else "image_corrupt", text) from None
    return image


def _check_size(image: Image.Image) -> None:
    """Raises: ImageError for a picture whose header alone says that it cannot be used."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("image_bomb", f"expected at most {MAX_PIXELS} pixels, found {width} x {height}")
    if max(width, height) > MAX_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        found = f"found {width} x {height}"
        raise ImageError("image_size", f"expected sides of at most {MAX_SIDE} and {MAX_RATIO} : 1, {found}")
    if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
        raise ImageError("image_animated", f"expected one frame, found {getattr(image, 'n_frames', 1)}")


def _rgb(image: Image.Image, form: str | None) -> Image.Image:
    try:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _scaled(image)
        if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")  # Pillow would copy it
    except (OSError, ValueError) as err:
        raise ImageError("image_corrupt", f"{form} of mode {image.mode}, which does not become RGB: {err}") from None


def _scaled(image: Image.Image) -> Image.Image:
    """8-bit RGB of a deeper greyscale image: by its mode's own range, or where that says nothing, by its brightest."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = 65535.0
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else max(255.0, float(values.max()))
    elif image.mode == "I":
        top = 255.0 if values.max(initial=0) <= 255 else max(65535.0, float(values.max()))
    grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
