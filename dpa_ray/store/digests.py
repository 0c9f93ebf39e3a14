"""What identifies a file's content: size and SHA-256, not computed twice while the file stays as it is."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa_ray.store.local import files_under
from dpa_ray.store.threads import each

FILES_AT_ONCE = 4  # hashing releases the interpreter lock
SETTLED_NS = 2_000_000_000
"""A file written to more recently may change again within one tick of the file system's clock: not remembered."""

_known: dict[tuple[str, int, int, int, int], str] = {}


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file as 64 hex digits; remembered in this process by path, size, times and inode."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        if key not in _known:
            settled = time.time_ns() - changed_ns > SETTLED_NS
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not settled:
                return digest
            _known[key] = digest
        return _known[key]


def digest_folder(folder: Path, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: {"size_bytes", "sha256"}} of the files under `folder` (all of them, or `names`), sorted by name."""
    digests: dict[str, dict[str, Any]] = {}

    def digest(name: str) -> None:
        digests[name] = {"size_bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)}

    each(digest, files_under(folder) if names is None else names, FILES_AT_ONCE)
    return dict(sorted(digests.items()))


def differences(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{name: what was expected and what is there} of the `files` that are not in `folder` as they should be.

    Sizes are compared first; only files of the right size are read.
    """
    found: dict[str, str] = {}

    def compare(name: str) -> None:
        expected = files[name]
        path = folder / name
        if not path.is_file():
            found[name] = f"expected {expected['size_bytes']} bytes, found no file"
        elif (size := path.stat().st_size) != expected["size_bytes"]:
            found[name] = f"expected {expected['size_bytes']} bytes, found {size}"
        elif (digest := digest_file(path)) != expected["sha256"]:
            found[name] = f"expected SHA-256 {expected['sha256']}, found {digest}"

    each(compare, files, FILES_AT_ONCE)
    return dict(sorted(found.items()))
