"""Where is q of a sample's targets, once it is computed? In a Parquet file beside each shard, row by row, and joined by row.

A file has the rows and row groups of its shard: `log_q` and `logit` of each target, in their order. log_q is -inf, and
the logit 0, where no text comes before the target; both are 0 of a sample without an image: there q is p, and nobody reads
them. A row that nobody asked for is null; a shard of such rows has no file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.batch import Encoded
from dpa_ray.data.prepared import Prepared
from dpa_ray.data.retry import retried
from dpa_ray.data.skip import entry_of
from dpa_ray.errors import UserError

Scores = np.ndarray
"""(2, N) float32: log q and logit of a sample's targets."""

CACHE_GROUPS = 4096
"""Row groups that a process keeps: a shuffle window of 65,536 rows in groups of 16, or 16 MB with 32 targets a row."""

SCHEMA = pa.schema([pa.field("log_q", pa.list_(pa.float32())), pa.field("logit", pa.list_(pa.float32()))])


def file_name(shard: int) -> str:
    """Of the shard with this number in `Prepared.shards`."""
    return f"shard-{shard:05d}.parquet"


def is_finite(scores: Scores) -> bool:
    """Are they numbers to train with? (log q may be -inf.)"""
    return not (np.isnan(scores).any() or np.isposinf(scores).any())


def write_scores(path: Path, groups: Sequence[int], rows: Sequence[Scores | None]) -> None:
    """Write the scores of a shard's `rows`, None where there are none, in row groups of `groups` rows."""
    columns = [[None if scores is None else scores[i] for scores in rows] for i in range(2)]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    start = 0
    with pq.ParquetWriter(path, SCHEMA, compression="NONE", use_dictionary=False, write_statistics=False) as writer:
        for num in groups:
            writer.write_table(table.slice(start, num), row_group_size=num)
            start += num


class BlindScores:
    """The scores of a prepared source, by the cursor's rows. Picklable; what it has read stays in its process.

    `fetch` gives a file of the artifact by its name, verified; `url` says where the artifact is, for people.
    """

    def __init__(self, prepared: Prepared, fetch: Callable[[str], Path], url: str):
        self._prepared, self._fetch, self._url = prepared, fetch, url
        self._ends = np.cumsum(prepared.row_groups)
        self._places = [(s, g) for s, (_, groups) in enumerate(prepared.shards) for g in range(len(groups))]
        self._files: dict[int, Path] = {}
        self._groups: OrderedDict[int, list[Scores | None]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_groups": OrderedDict()}

    def join(self, row: int, encoded: Encoded, place: str) -> None:
        """Set `encoded.blind` to the scores of `row`. Raises: UserError, naming `place`, where they are not its own."""
        scores, num_targets = self.scores(row), int(encoded.target.sum())
        if scores is None or scores.shape[1] != num_targets:
            found = "none" if scores is None else str(scores.shape[1])
            raise UserError(
                f"{place}: expected q of {num_targets} targets, found {found} in row {row} of {self._url}; delete that "
                "folder to have it computed again, or set cmo.blind=live"
            )
        if not is_finite(scores):
            raise UserError(
                f"{place}: its q without the image, row {row} of {self._url}, is not finite; to go on without this sample, "
                f"add {entry_of(self._prepared.digest, row)!r} to data.skip_ids"
            )
        encoded.blind = np.zeros((2, len(encoded.target)), np.float32)
        encoded.blind[:, encoded.target] = scores

    def scores(self, row: int) -> Scores | None:
        """(2, N) log q and logit of the row's targets, None where they were not asked for."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group not in self._groups:
            self._groups[group] = self._read(*self._places[group])
            while len(self._groups) > CACHE_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        rows = self._groups[group]
        return rows[row - (int(self._ends[group]) - len(rows))]

    def _read(self, shard: int, index: int) -> list[Scores | None]:
        name, expected = file_name(shard), self._prepared.shards[shard][1]
        if shard not in self._files:
            self._files[shard] = retried(lambda: self._fetch(name), f"{self._url}/{name}")
        try:
            with pq.ParquetFile(self._files[shard]) as file:
                found = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
                if found != expected or file.schema_arrow != SCHEMA:
                    raise UserError(
                        f"{self._url}/{name}: expected q of {sum(expected)} rows in {len(expected)} row groups, as in "
                        f"shard {self._prepared.shards[shard][0]}, found {sum(found)} in {len(found)}"
                    )
                table = file.read_row_group(index, use_threads=False)
        except (OSError, pa.ArrowException) as err:
            raise UserError(f"{self._url}/{name} cannot be read: {err}") from None
        log_q, logit = (_split(table[field.name].combine_chunks()) for field in SCHEMA)
        return [None if q is None else np.stack([q, z]) for q, z in zip(log_q, logit, strict=True)]  # type: ignore[list-item]


def _split(column: pa.ListArray) -> list[np.ndarray | None]:
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    null = column.is_null().to_numpy(zero_copy_only=False)
    return [None if null[i] else values[offsets[i] : offsets[i + 1]] for i in range(len(column))]
