"""How is one file of a source read? By ranges, from where it was after an outage of S3."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from pyarrow import fs

from dpa_ray.data.files import open_uri
from dpa_ray.data.retry import first_line, retried
from dpa_ray.errors import UserError

_CHUNK_BYTES = 4 * 2**20


class File(io.RawIOBase):
    """A file by its URI, opened when it is read, and again after a read that failed. Not to be shared by threads.

    Also a Python file, for pyarrow.parquet. Raises, in every method: UserError where there is no such file, it cannot
    be read, or is another than before.
    """

    def __init__(self, uri: str):
        super().__init__()
        self.uri = uri
        self._file: Any = None
        self._tag: Any = None  # what S3 calls this content, told when the file is opened
        self._position = 0
        self.size_bytes: int = self._tried(self._size)

    def at(self, start: int, num_bytes: int) -> bytes:
        """`num_bytes` from `start` on, fewer at the file's end."""
        num_bytes = min(num_bytes, self.size_bytes - start)
        if num_bytes <= 0:
            return b""
        data: bytes = self._tried(lambda: self._read(start, num_bytes))
        if len(data) < num_bytes:
            raise self._changed(f"{self.size_bytes} bytes", start + len(data))
        return data

    def _tried(self, call: Any) -> Any:
        try:
            return retried(call, self.uri)
        except OSError as err:
            raise UserError(f"{self.uri} cannot be read: {first_line(err)}") from None

    def _size(self) -> int:
        system, path = open_uri(self.uri)
        info = system.get_file_info(path)
        if info.type != fs.FileType.File:
            found = "a folder" if info.type == fs.FileType.Directory else "nothing"
            if found == "nothing" and re.search(r"[*?\[{]", self.uri):
                found += (
                    " (globs and {00..12} patterns are for tars and Parquet only; several files are a list of sources)"
                )
            raise UserError(f"expected a file at {self.uri}, found {found}")
        size: int = info.size
        return size

    def _read(self, start: int, num_bytes: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._opened()
            data: bytes = self._file.read_at(num_bytes, start)
            return data
        except OSError:
            self._drop()  # an open file may keep what failed
            raise

    def _opened(self) -> Any:
        system, path = open_uri(self.uri)
        file = system.open_input_file(path)
        tag = (file.metadata() or {}).get("ETag")
        if file.size() != self.size_bytes:
            raise self._changed(f"{self.size_bytes} bytes", file.size())
        if self._tag not in (None, tag):
            raise self._changed(f"ETag {self._tag!r}", tag)
        self._tag = tag
        return file

    def _changed(self, expected: str, found: Any) -> UserError:
        return UserError(f"{self.uri}: expected {expected}, found {found!r}: it changed while it was read; start again")

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- as a Python file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        data = self.at(self._position, self.size_bytes if size is None or size < 0 else size)
        self._position += len(data)
        return data

    def close(self) -> None:
        self._drop()
        super().close()


def chunks(uri: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes [start, stop) of a file, a few MiB at a time.

    Raises: UserError where there is no such file, it cannot be read, or is shorter.
    """
    with File(uri) as file:
        stop = file.size_bytes if stop is None else stop
        while start < stop:
            data = file.at(start, min(_CHUNK_BYTES, stop - start))
            if not data:
                raise UserError(f"{uri}: expected {stop} bytes, found {start}: it changed while it was read")
            start += len(data)
            yield data
