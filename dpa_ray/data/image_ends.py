"""Do bytes that do not decode begin an image of a known format, and does that image end too soon?

Decoders say one and the same of a file that is cut and of one that is damaged; most formats know their own length.
"""

from __future__ import annotations

_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x01\x00")
_BOXED = (b"ftypavif", b"ftypavis", b"jP  \r\n\x87\n")  # behind the length of the first box


def is_image(data: bytes) -> bool:
    """Does `data` begin as images of a known format do, as far as it goes?"""
    if data.startswith(b"RIFF"):  # sound and film begin so too
        return b"WEBP".startswith(data[8:12])
    return data.startswith((*_STARTS,)) or data[4:12] in _BOXED


def is_cut(data: bytes) -> bool | None:
    """Does an image end before the place that it names as its end? None where its format names none."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"\x00\x00\x01\x00"):  # ICO: a directory of 16 bytes a picture
        return len(data) < 6 + 16 * int.from_bytes(data[4:6], "little")
    if data.startswith((b"II*\x00", b"MM\x00*")):  # TIFF: a directory of 12 bytes a tag
        order = "little" if data.startswith(b"II") else "big"
        at = int.from_bytes(data[4:8], order) + 2  # type: ignore[arg-type]
        return len(data) < at + 12 * int.from_bytes(data[at - 2 : at], order)  # type: ignore[arg-type]
    if data[4:12] in _BOXED:
        return _boxes_are_cut(data)
    return None


def _boxes_are_cut(data: bytes) -> bool:
    """Of AVIF and JPEG 2000: boxes, each with its length before it (0: to the end; 1: 64 bits follow the name)."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:
            return not data.rstrip(b"\x00").endswith(b"\xff\xd9")  # JPEG 2000's end of the codestream
        at += max(size, 8)
    return at > len(data)
