"""How a local folder serves as a store: files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dpa_ray.errors import UserError

TMP_PREFIX = ".tmp-"
"""Files and folders whose name begins so are under way, or left behind by a killed process: never listed."""

COPY_CHUNK_BYTES = 8 << 20
LINK_FROM_BYTES = 1 << 20
"""Smaller files are copied, not linked: configs that a person may edit in place must not change their original."""


@contextmanager
def whole_file(target: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target` when the block ends well, and is gone when it does not.

    `durable` also waits until content and name are on the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = _tmp_beside(target)
    try:
        with open(tmp, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(tmp, target)
        if durable:
            sync_folder(target.parent)
    finally:
        tmp.unlink(missing_ok=True)


def _tmp_beside(target: Path) -> Path:
    return target.parent / f"{TMP_PREFIX}{uuid.uuid4().hex}"


def _write_new(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet; False where it does."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_under(folder: Path) -> list[str]:
    """Names of all files under `folder`, relative to it with `/`, sorted; links are followed, each folder once."""
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would lead round for ever
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(TMP_PREFIX)]
        names += [Path(at, name).relative_to(folder).as_posix() for name in files if not name.startswith(TMP_PREFIX)]
    return sorted(names)


def copy_file(source: Path, target: Path, *, durable: bool = True) -> None:
    """Copy the content of `source`, in chunks."""
    with open(source, "rb") as file, whole_file(target, durable=durable) as copy:
        shutil.copyfileobj(file, copy, COPY_CHUNK_BYTES)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= LINK_FROM_BYTES:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = _tmp_beside(target)
        try:
            os.link(source, tmp)
            os.replace(tmp, target)
            return
        except OSError:  # another file system, or one without hard links: copied below, which names any real trouble
            pass
        finally:
            tmp.unlink(missing_ok=True)  # replacing a file by a link to itself leaves `tmp`
    copy_file(source, target)


@dataclass(frozen=True)
class LocalFolder:
    """The store's operations on a local folder. Paths are relative to `root` and already checked."""

    root: Path

    def check(self, write: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(
                f"store {self.root}: expected a folder, found a file; give a folder, s3://bucket/prefix or gs://bucket/prefix"
            )
        if write:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = _tmp_beside(self.root / "probe")
            _write_new(probe, b"dpa_ray")
            probe.unlink()
        elif self.root.exists():
            os.listdir(self.root)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read_bytes(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def digest(self, path: str) -> tuple[int, str]:
        with open(self.root / path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest

    def write_bytes(self, path: str, data: bytes) -> None:
        with whole_file(self.root / path) as file:
            file.write(data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = _tmp_beside(target)
        try:
            _write_new(tmp, data)
            try:
                os.link(tmp, target)  # unlike O_EXCL, nobody sees the file before its content is there
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                return _write_new(target, data)
            sync_folder(target.parent)
            return True
        finally:
            tmp.unlink(missing_ok=True)

    def honours_conditions(self, path: str) -> bool:
        return not self.put_if_absent(path, b"")

    def append_line(self, path: str, line: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.stat().st_nlink > 1:  # else the line would also reach the other name's readers
            copy_file(target, target)
        with open(target, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            data = memoryview(f"{line}\n".encode())
            try:
                while data:  # a write to a full disk is cut short before it fails
                    data = data[file.write(data) :]
            except OSError:
                os.ftruncate(file.fileno(), size)  # else the next line would follow half of this one
                raise

    def files(self, path: str, recursive: bool) -> list[str]:
        folder = self.root / path
        if recursive:
            return files_under(folder)
        return [name for name in _entries(folder) if not (folder / name).is_dir()]

    def folders(self, path: str) -> list[str]:
        folder = self.root / path
        return [name for name in _entries(folder) if (folder / name).is_dir()]

    def delete(self, path: str) -> None:
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def put_file(self, source: Path, path: str) -> None:
        copy_file(source, self.root / path)

    def get_file(self, path: str, target: Path) -> None:
        copy_file(self.root / path, target, durable=False)

    def copy(self, source: str, target: str) -> None:
        if (self.root / source).is_dir():
            for name in files_under(self.root / source):
                _link_or_copy(self.root / source / name, self.root / target / name)
        else:
            _link_or_copy(self.root / source, self.root / target)

    def arrow(self) -> tuple[Any, str]:
        from pyarrow import fs

        return fs.LocalFileSystem(), str(self.root)


def _entries(folder: Path) -> list[str]:
    """Sorted names in `folder`; none where it is absent or a file."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(TMP_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []
