"""The words of a prepared shard, row group by row group: images stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.data.prepared import Prepared, StoreLike
from dpa_ray.data.retry import first_line, retried
from dpa_ray.data.sample import Sample
from dpa_ray.data.shard_file import open_shard
from dpa_ray.data.shards import from_row
from dpa_ray.errors import UserError

COLUMNS = ("id", "place", "turns")


def text_groups(store: StoreLike, prepared: Prepared, shard: int) -> Iterator[list[Sample]]:
    """The samples of each row group of `shard`, without their images. Raises: UserError where it cannot be read."""
    name, groups = prepared.shards[shard]
    path = f"{prepared.shard_folder(shard)}/{name}"
    source = prepared.shard_source(shard)
    again = f"delete {store.url(prepared.shard_folder(shard))} to have the data prepared again"
    reader = _Reader(store, path, prepared.footers[shard])
    for index, num_rows in enumerate(groups):
        try:
            table = retried(lambda index=index: reader.read(index), store.url(path))  # type: ignore[misc]
        except (OSError, pa.ArrowException) as err:
            remedy = "" if "AWS Error " in str(err) else f"; {again}"  # the server's refusal says nothing of the shard
            raise UserError(f"{store.url(path)} cannot be read: {first_line(err)}{remedy}") from None
        if table.num_rows != num_rows:
            raise UserError(
                f"{store.url(path)}: expected {num_rows} rows in row group {index}, found {table.num_rows}; {again}"
            )
        yield [from_row({**row, "images": [], "grounded": []}, source) for row in table.to_pylist()]


class _Reader:
    """One file, opened again after a failure: an open one may keep what failed."""

    def __init__(self, store: StoreLike, path: str, footer: str):
        self._store, self._path, self._footer = store, path, footer
        self._file: pq.ParquetFile | None = None

    def read(self, index: int) -> pa.Table:
        file, self._file = self._file, None
        if file is None:
            system, root = self._store.arrow()
            file = open_shard(system.open_input_file(f"{root}/{self._path}"), self._footer)
        table = file.read_row_group(index, columns=list(COLUMNS), use_threads=False)
        self._file = file
        return table
