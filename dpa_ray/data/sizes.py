"""How large is each row, to group like with like before anything is encoded? One byte a row, in order, beside the shards.

Number of images (3: or more) times 64, plus the number of characters on a scale of quarter octaves. A shard's footer has
its rows' sizes too, so that a source is whole with its shards: data that was prepared without the file is read there.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.data.prepared import SIZES_FILE, Prepared, StoreLike
from dpa_ray.data.retry import bridging, first_line, retried
from dpa_ray.data.sample import Sample
from dpa_ray.data.shard_file import open_shard
from dpa_ray.errors import UserError

FOOTER_KEY = "dpa_ray.sizes"

ONE_IMAGE = 64
"""The smallest size with an image."""

CACHE_BYTES = 48 * 2**20
"""Footers' sizes that are kept: all of them, up to 50 million rows. (What is read from a file is kept whole.)"""

_READS = 16


def size_of(sample: Sample) -> int:
    """0..255: larger with more images, then with more text."""
    num_characters = sum(len(turn.text) for turn in sample.turns)
    return ONE_IMAGE * min(3, len(sample.images)) + min(ONE_IMAGE - 1, int(4 * math.log2(1 + num_characters)))


def to_footer(sizes: Sequence[int]) -> dict[str, str]:
    """A shard's sizes as the key and value of its footer."""
    return {FOOTER_KEY: base64.b64encode(bytes(sizes)).decode()}


def footer_text(path: Path) -> str:
    """The sizes in the footer of the shard at `path`, as they stand there."""
    text: bytes = pq.read_metadata(path).metadata[FOOTER_KEY.encode()]
    return text.decode()


def from_text(text: str | bytes) -> np.ndarray:
    """(N,) uint8: the sizes of a shard's rows. Raises: ValueError."""
    return np.frombuffer(base64.b64decode(text), np.uint8)


def in_footer(store: StoreLike, folder: str, name: str, num_rows: int, sha256: str) -> np.ndarray:
    """(num_rows,) uint8: the sizes in the footer of a shard in `folder`, which has this SHA-256 ("": not known).

    Raises: UserError naming the shard where it cannot be read.
    """
    path, again = f"{folder}/{name}", _again(store, folder)
    try:
        footer = retried(lambda: _footer(store, path, sha256), store.url(path))
        sizes = from_text(footer.get(FOOTER_KEY.encode(), b""))
    except (OSError, ValueError, pa.ArrowException) as err:
        remedy = "" if "AWS Error " in str(err) else f"; {again}"  # the server's refusal says nothing of the shard
        raise UserError(f"{store.url(path)}: its footer cannot be read: {first_line(err)}{remedy}") from None
    if len(sizes) != num_rows:
        raise UserError(
            f"{store.url(path)}: expected the sizes of {num_rows} rows in its footer, found {len(sizes)}; {again}"
        )
    return sizes


def _footer(store: StoreLike, path: str, expected_sha256: str) -> dict[bytes, bytes]:
    system, root = store.arrow()
    with system.open_input_file(f"{root}/{path}") as file:
        return open_shard(file, expected_sha256).metadata.metadata or {}


def _again(store: StoreLike, folder: str) -> str:
    return f"delete {store.url(folder)} to have the data prepared again"


class Sizes:
    """Rows, numbered as the cursor does, to their sizes; an S3 outage of `retry_s` only delays.

    Each source's are read at once, at their first use, in one request; of a source without SIZES_FILE, shard by shard.
    """

    def __init__(self, store: StoreLike, prepared: Prepared, cache_bytes: int = CACHE_BYTES, *, retry_s: float = 0.0):
        self._store, self._prepared, self._cache_bytes, self._retry_s = store, prepared, cache_bytes, retry_s
        self._num_rows = np.array([sum(groups) for _, groups in prepared.shards], np.int64)
        self._ends = np.cumsum(self._num_rows)
        self._sources: dict[str, np.ndarray] = {}  # by folder
        self._starts: list[int] = []  # of each shard in its source's sizes
        self._totals: dict[str, int] = {}  # rows of each source
        starts: dict[tuple[str, str], int] = {}
        for shard, (name, _) in enumerate(prepared.shards):
            folder = prepared.shard_folder(shard)
            if (folder, name) not in starts:  # a mixture may take a source several times
                starts[folder, name] = self._totals.get(folder, 0)
                self._totals[folder] = starts[folder, name] + int(self._num_rows[shard])
            self._starts.append(starts[folder, name])
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(N,) uint8: the sizes of (N,) `rows`. Raises: UserError naming a file that cannot be read."""
        shard = np.searchsorted(self._ends, rows, side="right")
        wanted = [int(s) for s in np.unique(shard)]
        in_files = {s for s in wanted if self._file(s)}
        files = {self._prepared.shard_folder(s): self._file(s) for s in in_files}
        unread = [folder for folder in files if folder not in self._sources]
        missing = [s for s in wanted if s not in in_files and s not in self._cache]
        with bridging(self._retry_s), ThreadPoolExecutor(_READS) as pool:
            sources = pool.map(lambda folder: self._read_source(folder, files[folder]), unread)
            self._sources.update(zip(unread, sources, strict=True))
            read = dict(zip(missing, pool.map(self._read, missing), strict=True))
        sizes = np.empty(len(rows), np.uint8)
        for s in wanted:
            here = shard == s
            inside = rows[here] - (self._ends[s] - self._num_rows[s])
            if s in in_files:
                sizes[here] = self._sources[self._prepared.shard_folder(s)][self._starts[s] + inside]
            else:
                sizes[here] = (read[s] if s in read else self._cache[s])[inside]
        self._keep(read)
        return sizes

    def _keep(self, read: dict[int, np.ndarray]) -> None:
        for shard, sizes in read.items():
            self._cache[shard] = sizes
            self._cached_bytes += len(sizes)
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])

    def _file(self, shard: int) -> str:
        """The SHA-256 of the SIZES_FILE that a shard's sizes are in, "" where they are in its footer alone."""
        return self._prepared.sizes[shard] if self._prepared.sizes else ""

    def _read(self, shard: int) -> np.ndarray:
        name, folder = self._prepared.shards[shard][0], self._prepared.shard_folder(shard)
        return in_footer(self._store, folder, name, int(self._num_rows[shard]), self._prepared.footers[shard])

    def _read_source(self, folder: str, sha256: str) -> np.ndarray:
        """The sizes of all rows of a source."""
        path, expected = f"{folder}/{SIZES_FILE}", self._totals[folder]
        url, again = self._store.url(path), _again(self._store, folder)
        try:
            data = retried(lambda: self._store.read_bytes(path), url)
        except FileNotFoundError:
            raise UserError(f"{url}: expected the sizes of {expected} rows, found no file; {again}") from None
        if len(data) != expected:
            raise UserError(f"{url}: expected the sizes of {expected} rows, found {len(data)} bytes; {again}")
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise UserError(f"{url}: expected SHA-256 {sha256}, found {found}; {again}")
        return np.frombuffer(data, np.uint8)
