"""How many samples a second does one decode process read of a store that is far away?

Prepared shards of images of 100 kB, behind a file system whose every opening and reading takes a while; micro-batches of 8
rows at random, as a shuffled epoch has them. Shards are read one at a time, and several at once as the product does. Rounds
are interleaved.

    python -m tests.benchmarks.far_store --latency-ms 30
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from dpa_ray.data import ingest, sources
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
from tests import tiny_models


class _FarFile:
    """A local file of which each reading takes `latency_s`."""

    def __init__(self, path: str, latency_s: float):
        self._file, self._latency_s = open(path, "rb"), latency_s  # noqa: SIM115
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        time.sleep(self._latency_s)
        return self._file.read(size)

    def seek(self, *where: int) -> int:
        return self._file.seek(*where)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self.closed = True
        self._file.close()


class _Far(pafs.FileSystemHandler):  # type: ignore[misc]
    """A local file system at a distance: what a reader of shards asks of it."""

    def __init__(self, latency_s: float):
        self.latency_s = latency_s

    def open_input_file(self, path: str) -> Any:
        time.sleep(self.latency_s)
        return pa.PythonFile(_FarFile(path, self.latency_s), mode="r")

    def get_type_name(self) -> str:
        return "far"

    def normalize_path(self, path: str) -> str:
        return path


for _name in ("get_file_info", "get_file_info_selector", "create_dir", "delete_dir", "delete_dir_contents", "delete_root_dir_contents",
              "delete_file", "move", "copy_file", "open_input_stream", "open_output_stream", "open_append_stream"):  # fmt: skip
    setattr(_Far, _name, lambda self, *_: NotImplemented)
_Far.__abstractmethods__ = frozenset()


class FarStore(Store):
    def __init__(self, uri: str, latency_s: float):
        super().__init__(uri)
        self.latency_s = latency_s

    def arrow(self) -> tuple[Any, str]:
        return pafs.PyFileSystem(_Far(self.latency_s)), super().arrow()[1]


def rate(loader: Loader, at_once: int, rows: np.ndarray, micro_batch: int) -> float:
    """Samples a second, nothing kept from before."""
    loader._reader = None
    ingest.READS_AT_ONCE = at_once
    start = time.perf_counter()
    for first in range(0, len(rows), micro_batch):
        loader.samples(rows[first : first + micro_batch])
    return len(rows) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpa-far-") as name:
        folder = Path(name)
        data = tiny_models.make_captions(folder / "data", options.samples, seed=0)
        for file in data.images.iterdir():  # bytes behind an image's end are no part of it, and are stored with it
            file.write_bytes(file.read_bytes() + np.random.default_rng(0).bytes(100_000))
        sources.MAX_PART_ROWS = options.samples // options.shards
        store = Store(str(folder / "store"))
        prepared = prepare(
            store,
            SourceSection(source=str(data.file), images=str(data.images), format="llava"),
            max_quarantined_fraction=0,
        )
        far = FarStore(str(folder / "store"), options.latency_ms / 1000)
        loader = Loader(far, prepared, None, None, 0, cache_bytes=16 * 2**20)  # type: ignore[arg-type]
        rates: dict[int, list[float]] = {1: [], ingest.READS_AT_ONCE: []}
        for round_ in range(options.rounds):
            rows = np.random.default_rng(round_).permutation(prepared.num_rows)[:160]
            for at_once, found in rates.items():
                found.append(rate(loader, at_once, rows, 8))
    print(f"{len(prepared.shards)} shards, {options.latency_ms:g} ms, micro-batches of 8, medians of {options.rounds}")
    for at_once, found in rates.items():
        print(f"{at_once} at once: {statistics.median(found):7.1f} samples/s a process")


if __name__ == "__main__":
    main()
