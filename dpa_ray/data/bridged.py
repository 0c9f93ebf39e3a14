"""How does the store bridge an outage of S3 while data is prepared, or state is saved? Every call is one that can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.data.prepared import StoreLike
from dpa_ray.data.retry import retried


@dataclass(frozen=True)
class BridgedStore:
    """A store whose calls wait, in a `bridging` block, for a server that is away."""

    store: StoreLike

    def url(self, path: str) -> str:
        return self.store.url(path)

    def exists(self, path: str) -> bool:
        return retried(lambda: self.store.exists(path), self.url(path))

    def read_bytes(self, path: str) -> bytes:
        return retried(lambda: self.store.read_bytes(path), self.url(path))

    def read_json(self, path: str) -> Any:
        return retried(lambda: self.store.read_json(path), self.url(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        retried(lambda: self.store.write_bytes(path, data), self.url(path))

    def write_json(self, path: str, value: Any) -> None:
        retried(lambda: self.store.write_json(path, value), self.url(path))

    def list_dirs(self, path: str) -> list[str]:
        return retried(lambda: self.store.list_dirs(path), self.url(path))

    def list(self, path: str, *, recursive: bool = True) -> list[str]:
        return retried(lambda: self.store.list(path, recursive=recursive), self.url(path))

    def delete(self, path: str) -> None:
        retried(lambda: self.store.delete(path), self.url(path))

    def upload(self, folder: Path, path: str, names: Sequence[str] | None = None) -> None:
        retried(lambda: self.store.upload(folder, path, names), self.url(path))

    def arrow(self) -> tuple[Any, str]:
        return retried(self.store.arrow, self.url(""))
