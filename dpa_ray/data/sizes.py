"""How large is each row, to group like with like before anything is encoded? One byte a row, in its shard's footer.

Number of images (3: or more) times 64, plus the number of characters on a scale of quarter octaves. The footer is read
without the shard; a mixture that names a shard twice, or a store without listing, needs nothing more.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from dpa_ray.data.prepared import Prepared, StoreLike
from dpa_ray.data.retry import bridging, first_line, retried
from dpa_ray.data.sample import Sample
from dpa_ray.data.shard_file import open_shard
from dpa_ray.errors import UserError

FOOTER_KEY = "dpa_ray.sizes"

ONE_IMAGE = 64
"""The smallest size with an image."""

CACHE_BYTES = 48 * 2**20
"""Shards' sizes that are kept: all of them, up to 50 million rows."""

_READS = 16


def size_of(sample: Sample) -> int:
    """0..255: larger with more images, then with more text."""
    num_characters = sum(len(turn.text) for turn in sample.turns)
    return ONE_IMAGE * min(3, len(sample.images)) + min(ONE_IMAGE - 1, int(4 * math.log2(1 + num_characters)))


def to_footer(sizes: Sequence[int]) -> dict[str, str]:
    """A shard's sizes as the key and value of its footer."""
    return {FOOTER_KEY: base64.b64encode(bytes(sizes)).decode()}


class Sizes:
    """Rows, numbered as the cursor does, to their sizes; an S3 outage of `retry_s` only delays."""

    def __init__(self, store: StoreLike, prepared: Prepared, cache_bytes: int = CACHE_BYTES, *, retry_s: float = 0.0):
        self._store, self._prepared, self._cache_bytes, self._retry_s = store, prepared, cache_bytes, retry_s
        self._num_rows = np.array([sum(groups) for _, groups in prepared.shards], np.int64)
        self._ends = np.cumsum(self._num_rows)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(N,) uint8: the sizes of (N,) `rows`. Raises: UserError naming a shard that cannot be read."""
        shard = np.searchsorted(self._ends, rows, side="right")
        wanted = [int(s) for s in np.unique(shard)]
        missing = [s for s in wanted if s not in self._cache]
        with bridging(self._retry_s), ThreadPoolExecutor(_READS) as pool:
            found = {**{s: self._cache[s] for s in wanted if s in self._cache}, **dict(pool.map(self._read, missing))}
        sizes = np.empty(len(rows), np.uint8)
        for s in wanted:
            here = shard == s
            sizes[here] = found[s][rows[here] - (self._ends[s] - self._num_rows[s])]
        self._keep({s: found[s] for s in missing})
        return sizes

    def _keep(self, read: dict[int, np.ndarray]) -> None:
        for shard, sizes in read.items():
            self._cache[shard] = sizes
            self._cached_bytes += len(sizes)
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])

    def _read(self, shard: int) -> tuple[int, np.ndarray]:
        folder = self._prepared.shard_folder(shard)
        path = f"{folder}/{self._prepared.shards[shard][0]}"
        again = f"delete {self._store.url(folder)} to have the data prepared again"
        try:
            footer = retried(lambda: self._footer(path, self._prepared.footers[shard]), self._store.url(path))
            sizes = np.frombuffer(base64.b64decode(footer.get(FOOTER_KEY.encode(), b"")), np.uint8)
        except (OSError, ValueError, pa.ArrowException) as err:
            remedy = "" if "AWS Error " in str(err) else f"; {again}"  # the server's refusal says nothing of the shard
            raise UserError(f"{self._store.url(path)}: its footer cannot be read: {first_line(err)}{remedy}") from None
        if len(sizes) != self._num_rows[shard]:
            raise UserError(
                f"{self._store.url(path)}: expected the sizes of {self._num_rows[shard]} rows in its footer, found "
                f"{len(sizes)}; {again}"
            )
        return shard, sizes

    def _footer(self, path: str, expected_sha256: str) -> dict[bytes, bytes]:
        system, root = self._store.arrow()
        with system.open_input_file(f"{root}/{path}") as file:
            return open_shard(file, expected_sha256).metadata.metadata or {}
