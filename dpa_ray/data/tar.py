"""Where do the members of a tar stand, and what is in them? Read by ranges and in order; nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpa_ray.data.reading import File
from dpa_ray.data.retry import first_line
from dpa_ray.errors import UserError

_WINDOW_BYTES = 2 * 2**20
_MAX_HEADER_BYTES = 16 * 2**20  # of a long name or pax header, which tarfile reads whole
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_ERRORS = (tarfile.TarError, ValueError, OverflowError, IndexError)  # what tarfile lets through at broken headers


@dataclass(frozen=True)
class Member:
    """A member: its name as it stands, the bytes [start, stop) with its header, and its content's place and size.

    `kind` is file, folder, or what else it is.
    """

    name: str
    kind: str
    start: int
    stop: int
    data: int
    size: int


class Tar:
    """A tar by its URI; not to be shared by threads."""

    def __init__(self, uri: str):
        self.uri = uri
        self._window = _Window(File(uri))

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._window.file.close()

    def members(self, start: int = 0, stop: int | None = None) -> Iterator[Member]:
        """Those whose headers lie in [start, stop), or to the end of the archive.

        Raises: UserError, with the tar's name and the byte, where it is no tar, is cut off, or has a broken header.
        """
        window: Any = self._window
        if start == 0:
            self._check_beginning()
        window.seek(start)
        archive: Any = None
        while stop is None or window.position < stop:
            here = window.position
            try:
                if archive is None:
                    archive = tarfile.TarFile(fileobj=window, encoding="utf-8", errors="surrogateescape")
                    info = archive.firstmember
                    if info is None:
                        return
                else:
                    info = tarfile.TarInfo.fromtarfile(archive)
            except tarfile.HeaderError as err:
                if type(err).__name__ == "EOFHeaderError":  # a block of zeros
                    return
                raise self._broken(here, err) from None
            except _ERRORS as err:
                raise self._broken(here, err) from None
            following = int(archive.offset)
            if following <= here:
                raise self._broken(here, ValueError(f"a member of {info.size} bytes"))
            if info.offset_data + max(0, info.size) > window.size and info.isreg():
                raise UserError(
                    f"{self.uri}: truncated: expected {info.size} bytes of {info.name[:200]!r} from byte "
                    f"{info.offset_data} on, found the end of the file at byte {window.size}"
                )
            yield Member(info.name, _kind(info), here, following, info.offset_data, info.size)
            window.seek(following)

    def read(self, member: Member) -> bytes:
        """A member's content."""
        return self._window.at(member.data, member.size)

    def _check_beginning(self) -> None:
        if self._window.size == 0:
            raise UserError(f"{self.uri}: expected a tar, found an empty file")
        first = self._window.at(0, min(8, self._window.size))
        for mark, name in _PACKED.items():
            if first.startswith(mark):
                raise UserError(f"{self.uri}: expected a tar that is not compressed, found {name}: unpack it first")

    def _broken(self, here: int, err: Exception) -> UserError:
        if here == 0:
            return UserError(f"{self.uri}: expected a tar, found another file ({first_line(err)})")
        if here + tarfile.BLOCKSIZE > self._window.size:
            return UserError(
                f"{self.uri}: truncated: expected a member or the end-of-archive mark at byte {here}, found the end of "
                f"the file at byte {self._window.size}"
            )
        return UserError(f"{self.uri}: expected a member's header at byte {here}, found none ({first_line(err)})")


class _Window:
    """A file read through a window, so that small reads near each other are one request; as tarfile wants it."""

    def __init__(self, file: File):
        self.file, self.size = file, file.size_bytes
        self.position = 0
        self._data, self._start = b"", 0

    def at(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer at the file's end."""
        size = min(size, self.size - start)
        if size <= 0:
            return b""
        offset = start - self._start
        if offset < 0 or offset + size > len(self._data):
            wanted = min(max(size, _WINDOW_BYTES), self.size - start)
            self._data, self._start, offset = self.file.at(start, wanted), start, 0
        return self._data[offset : offset + size]

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise UserError(f"{self.file.uri}: expected a header at byte {self.position}, found one of {size} bytes")
        data = self.at(self.position, size)
        self.position += len(data)
        return data

    def seek(self, position: int) -> None:
        self.position = position

    def tell(self) -> int:
        return self.position


def _kind(info: tarfile.TarInfo) -> str:
    if info.isreg() and not info.issparse():
        return "file"
    if info.isdir():
        return "folder"
    if info.issym() or info.islnk():
        return "a link"
    return "a device or pipe" if info.isdev() else "a special file"
