"""What is known of a file from an earlier scan? Kept in the store, so that a large one is gone through once.

scans/<key>.json    what a scan gave; the key is of the file's URI, size and time of change
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

from dpa_ray.data.files import asked
from dpa_ray.data.prepared import StoreLike

VERSION = 2
"""Of what the scans of tars and Parquet files give: a change of that must change this."""

_SETTLED_S = 60.0  # S3 tells seconds: a file that changed just now may change again without a sign of it


class Known:
    """Scans of single files, by what tells that a file is the same; without a `store` nothing is known."""

    def __init__(self, store: StoreLike | None = None, *, write: bool = True):
        self._store, self._write = store, write

    def get(self, uri: str, scan: Callable[[str], Any], options: Any = None) -> Any:
        """`scan(uri)`, which gives plain JSON that depends on `options` (JSON too), or what it gave before."""
        key = self._key(uri, options)
        if self._store is None or key is None:
            return scan(uri)
        path = f"scans/{key}.json"
        if self._store.exists(path):
            return self._store.read_json(path)
        value = scan(uri)
        if self._write and self._key(uri, options) == key:
            self._store.write_json(path, value)
        return value

    def _key(self, uri: str, options: Any) -> str | None:
        """None where the file is not there, or too young to be told from another of its size."""
        if self._store is None:
            return None
        try:
            info = asked(uri, lambda system, path: system.get_file_info(path))
        except OSError:  # the scan itself tells it better
            return None
        if info.size is None or info.mtime_ns is None or time.time() - info.mtime_ns / 1e9 < _SETTLED_S:
            return None
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        server = endpoint if uri.startswith("s3://") else None
        content = [VERSION, server, uri, options, info.size, info.mtime_ns]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


NOTHING = Known()
