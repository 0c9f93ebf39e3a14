"""What is known of prepared data: its manifest, as the rest of the code reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpa_ray.errors import BrokenJson, UserError

SCHEMA_VERSION = 1
"""Of the manifest."""
SIZES_FILE = "sizes.uint8"
"""Beside a source's shards: the size of each row (see sizes.py), a byte each, in order."""
SEAL = "sha256"
"""In a manifest: of all that it says but this."""


class StoreLike(Protocol):
    """What is needed of dpa_ray.store.fs.Store; paths are relative to it."""

    def url(self, path: str) -> str: ...
    def exists(self, path: str) -> bool: ...
    def read_bytes(self, path: str) -> bytes: ...
    def read_json(self, path: str) -> Any: ...
    def write_bytes(self, path: str, data: bytes) -> None: ...
    def write_json(self, path: str, value: Any) -> None: ...
    def list_dirs(self, path: str) -> list[str]: ...
    def list(self, path: str, *, recursive: bool = True) -> list[str]: ...
    def delete(self, path: str) -> None: ...
    def upload(self, folder: Path, path: str, names: Sequence[str] | None = None) -> None: ...
    def arrow(self) -> tuple[Any, str]: ...


@dataclass(frozen=True)
class Prepared:
    """A prepared source, or a mixture of some. Rows are numbered through all shards, in order, without the quarantined
    ones; a source that a mixture takes twice has its shards here twice, and its rows two numbers."""

    digest: str
    num_rows: int
    shards: tuple[tuple[str, tuple[int, ...]], ...]  # (file name, rows of each row group)
    num_quarantined: int
    sizes_bytes: tuple[int, ...] = ()  # of each shard
    footers: tuple[str, ...] = ()  # SHA-256 of each shard's footer, "" where it is not known
    sizes: tuple[str, ...] = ()  # SHA-256 of the SIZES_FILE beside each shard, "" where there is none
    source_name: str = ""  # comes before the place of a sample
    num_with_system: int = 0  # samples that have a system turn
    homes: tuple[tuple[str, str], ...] = ()  # of a mixture, for each shard: the digest and name of its source

    @property
    def path(self) -> str:
        """The folder in the store."""
        return f"data/{self.digest}"

    def shard_folder(self, shard: int) -> str:
        """The folder in the store in which a shard lies."""
        return f"data/{self.homes[shard][0]}" if self.homes else self.path

    def shard_source(self, shard: int) -> str:
        """What comes before the place of a shard's samples."""
        return self.homes[shard][1] if self.homes else self.source_name

    @property
    def row_groups(self) -> list[int]:
        """Rows of each row group of all shards, in order: what the cursor needs."""
        return [rows for _, groups in self.shards for rows in groups]


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of what it says."""
    return {**manifest, SEAL: _sha256(manifest)}


def _sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_prepared(store: StoreLike, digest: str) -> Prepared | None:
    """The data under `digest`, or None where it, or a source of the mixture that it is, is not prepared.

    Raises: UserError where its manifest is not one that this version reads, or not what was written.
    """
    path = f"data/{digest}/manifest.json"
    if not store.exists(path):
        return None
    try:
        manifest = store.read_json(path)
        if manifest["schema"] != SCHEMA_VERSION or manifest["digest"] != digest:
            raise ValueError(f"schema {manifest['schema']}, digest {manifest['digest']}")
        if manifest.get(SEAL, "") not in ("", _sha256(manifest)):  # older ones have none
            raise ValueError("its content is not what was written: its SHA-256 is another")
        if "mixture" not in manifest:
            return _source(digest, manifest)
        pieces = [(_text(piece["digest"]), _count(piece["times"])) for piece in manifest["mixture"]]
        if digest in dict(pieces):
            raise ValueError("a mixture of itself")
    except (BrokenJson, KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
        folder = store.url(f"data/{digest}")
        raise UserError(
            f"{store.url(path)}: expected a manifest of schema {SCHEMA_VERSION} for {digest}, found another ({err}); "
            f"delete the folder {folder} to have the data prepared again"
        ) from None
    parts = [(part, times) for name, times in pieces if (part := find_prepared(store, name)) is not None]
    return mixed(digest, parts) if len(parts) == len(pieces) else None


def _source(digest: str, manifest: dict[str, Any]) -> Prepared:
    """One source's. Raises: KeyError, TypeError or ValueError where the manifest is odd."""
    shards = manifest["shards"]
    found = Prepared(
        digest=digest,
        num_rows=_count(manifest["num_rows"]),
        shards=tuple((_text(shard["name"]), tuple(map(_count, shard["rows"]))) for shard in shards),
        num_quarantined=_count(manifest["num_quarantined"]),
        sizes_bytes=tuple(_count(shard["size_bytes"]) for shard in shards),
        footers=tuple(_text(shard.get("footer_sha256", "")) for shard in shards),
        sizes=(_sizes(manifest),) * len(shards),
        source_name=_text(manifest["source_name"]),
        num_with_system=_count(manifest["num_with_system"]),
    )
    if found.num_rows != sum(found.row_groups):
        raise ValueError(f"{found.num_rows} rows, {sum(found.row_groups)} in its shards")
    return found


def _sizes(manifest: dict[str, Any]) -> str:
    """The SHA-256 of its SIZES_FILE, "" where it has none. Raises: KeyError, TypeError or ValueError."""
    if "sizes" not in manifest:  # an older one
        return ""
    sizes = manifest["sizes"]
    if sizes["name"] != SIZES_FILE or _count(sizes["size_bytes"]) != manifest["num_rows"]:
        raise ValueError(f"{sizes['size_bytes']} bytes of sizes in {sizes['name']!r} for {manifest['num_rows']} rows")
    return _text(sizes["sha256"])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number of 0 or more, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {value!r}")
    return value


def mixed(digest: str, parts: Sequence[tuple[Prepared, int]]) -> Prepared:
    """The mixture of prepared sources, each taken so many times."""
    each = [part for part, times in parts for _ in range(times)]
    return Prepared(
        digest=digest,
        num_rows=sum(part.num_rows for part in each),
        shards=tuple(shard for part in each for shard in part.shards),
        num_quarantined=sum(part.num_quarantined for part, _ in parts),
        sizes_bytes=tuple(size for part in each for size in part.sizes_bytes),
        footers=tuple(footer for part in each for footer in part.footers),
        sizes=tuple(digest for part in each for digest in part.sizes),
        num_with_system=sum(part.num_with_system for part in each),
        homes=tuple((part.digest, part.source_name) for part in each for _ in part.shards),
    )
