"""How is a prepared shard opened, so that no flipped bit of it is ever trained on? Pages have checksums, the footer a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_TAIL_BYTES = 256 << 10
"""Read at once from a shard's end; most footers are shorter: one takes some 700 bytes a row group."""


def footer_sha256(path: Path) -> str:
    """Of the footer of the shard at `path`, with its length and magic number."""
    with pa.OSFile(str(path)) as file:
        return hashlib.sha256(_footer(file)).hexdigest()


def read_footer(file: pa.NativeFile, expected_sha256: str = "") -> bytes:
    """The footer of the shard in `file`, with its length and magic number.

    Raises: OSError where it is none, or has another SHA-256 than expected ("": not known).
    """
    footer = _footer(file)
    if expected_sha256 and (found := hashlib.sha256(footer).hexdigest()) != expected_sha256:
        raise OSError(f"expected a footer with SHA-256 {expected_sha256}, found {found}")
    return footer


def open_shard(file: pa.NativeFile, expected_sha256: str = "", footer: bytes | None = None) -> pq.ParquetFile:
    """The shard in `file`; what is read of it is checked page by page.

    Args:
        footer: what `read_footer` gave for it before.
    Raises: OSError where its footer is none, or has another SHA-256 than expected ("": not known); so does reading a row
        group where a page is not what was written.
    """
    metadata = pq.read_metadata(pa.BufferReader(_MAGIC + (footer or read_footer(file, expected_sha256))))
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=True, page_checksum_verification=True)


def _footer(file: pa.NativeFile) -> bytes:
    size = file.size()
    tail = file.read_at(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != _MAGIC or not 8 < length <= size - len(_MAGIC):
        raise OSError(f"expected the footer of a Parquet file at its end, found {tail[-8:]!r}")
    whole: bytes = tail[-length:] if length <= len(tail) else file.read_at(length, size - length)
    return whole
