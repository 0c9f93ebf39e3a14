"""Which samples does `data.skip_ids` mean? Rows of prepared data, found by their ids or named by digest and number.

An entry that reads `<hex digits>:<number>` names a row: a digest's first digits (6 or more) and the row's number, as the
cursor counts. Any other is an `id`, and means every row that has it, in all training data. A row that a mixture takes
several times is one sample: all its numbers are meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from dpa_ray.data.prepared import Prepared, StoreLike
from dpa_ray.data.retry import first_line, retried
from dpa_ray.data.shard_file import open_shard
from dpa_ray.errors import UserError

DIGITS = 8
"""Of a digest, in the entries that messages propose."""

_ROW = re.compile(r"([0-9a-f]{6,}):([0-9]{1,18})")


@dataclass(frozen=True)
class Skipped:
    """A row that is passed over."""

    row: int
    id: str | None
    place: str


@dataclass
class Found:
    """What entries mean, by data set, rows rising; and what is wrong with them, by key path."""

    skipped: dict[str, tuple[Skipped, ...]] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)


def entry_of(digest: str, row: int) -> str:
    """The entry that names one row."""
    return f"{digest[:DIGITS]}:{row}"


def rows_named(entries: Iterable[str], digest: str) -> list[str]:
    """Those of `entries` that name a row of the data `digest`, whether it has one or not."""
    return [text for text in entries if (named := _ROW.fullmatch(text)) and digest.startswith(named[1])]


def find(store: StoreLike, sets: Mapping[str, Prepared], entries: Sequence[str]) -> Found:
    """The rows that `entries` mean in prepared `sets`, each by its name in a recipe (data.pretrain, say).

    An entry that means no row is an error: it would not keep away what it was written against. Ids are looked for in
    one pass over the columns of ids. Raises: UserError where a shard cannot be read.
    """
    found = Found()
    rows: dict[str, dict[int, Skipped]] = {name: {} for name in sets}
    ids: dict[str, list[int]] = {}  # to the numbers of their entries
    for number, text in enumerate(entries):
        named = _ROW.fullmatch(text)
        if named is None:
            ids.setdefault(text, []).append(number)
            continue
        problem = _add_row(store, sets, named[1], int(named[2]), rows)
        if problem is not None:
            found.errors.append((f"data.skip_ids.{number}", f"{problem}, found {text!r}"))
    seen = _add_ids(store, sets, ids.keys(), rows) if ids else set()
    for text in ids.keys() - seen:
        expected = "expected the id of a sample, or DIGEST:ROW, of " + " or ".join(_shown(sets))
        found.errors += [
            (f"data.skip_ids.{number}", f"{expected}, found {text!r}, which none has") for number in ids[text]
        ]
    found.errors.sort(key=lambda error: int(error[0].rpartition(".")[2]))
    found.skipped = {name: tuple(here[row] for row in sorted(here)) for name, here in rows.items() if here}
    return found


def _add_row(
    store: StoreLike, sets: Mapping[str, Prepared], digest: str, row: int, rows: dict[str, dict[int, Skipped]]
) -> str | None:
    """Add the row to the sets whose digest begins so; what was expected, where there is no such row."""
    meant = {name: prepared for name, prepared in sets.items() if prepared.digest.startswith(digest)}
    if not meant:
        return "expected the first digits of " + " or ".join(_shown(sets))
    for name, prepared in meant.items():
        if row >= prepared.num_rows:
            return f"expected a row of {name} below {prepared.num_rows}"
        ends = np.cumsum(prepared.row_groups)
        group = int(np.searchsorted(ends, row, side="right"))
        places = [(shard, g) for shard, (_, groups) in enumerate(prepared.shards) for g in range(len(groups))]
        shard, index = places[group]
        inside = row - int(ends[group] - prepared.row_groups[group])
        found = _Ids(store, prepared, shard).group(index)[inside]
        rows[name].update(_copies(prepared, shard, row - _start(prepared, shard), *found))
    return None


def _add_ids(
    store: StoreLike,
    sets: Mapping[str, Prepared],
    wanted: Collection[str],
    rows: dict[str, dict[int, Skipped]],
) -> set[str]:
    """Add all rows with one of the ids `wanted`; those that there are."""
    seen: set[str] = set()
    for name, prepared in sets.items():
        gone_through: set[tuple[str, str]] = set()
        for shard, (file, _) in enumerate(prepared.shards):
            if (key := (prepared.shard_folder(shard), file)) in gone_through:
                continue
            gone_through.add(key)
            for inside, (identity, place) in enumerate(_Ids(store, prepared, shard)):
                if identity is not None and identity in wanted:
                    seen.add(identity)
                    rows[name].update(_copies(prepared, shard, inside, identity, place))
    return seen


def _copies(prepared: Prepared, shard: int, inside: int, identity: str | None, place: str) -> dict[int, Skipped]:
    """Every row that is the row `inside` of this shard's file."""
    file = (prepared.shard_folder(shard), prepared.shards[shard][0])
    same = [s for s, (name, _) in enumerate(prepared.shards) if (prepared.shard_folder(s), name) == file]
    numbers = [_start(prepared, s) + inside for s in same]
    return {row: Skipped(row, identity, prepared.shard_source(shard) + place) for row in numbers}


def _start(prepared: Prepared, shard: int) -> int:
    """The number of a shard's first row."""
    return sum(sum(groups) for _, groups in prepared.shards[:shard])


def _shown(sets: Mapping[str, Prepared]) -> list[str]:
    return [f"{name} ({prepared.digest})" for name, prepared in sets.items()]


class _Ids:
    """(id, place) of a shard's rows, without anything else of them."""

    def __init__(self, store: StoreLike, prepared: Prepared, shard: int):
        self._store, self._groups = store, prepared.shards[shard][1]
        self._path, self._footer = (
            f"{prepared.shard_folder(shard)}/{prepared.shards[shard][0]}",
            prepared.footers[shard],
        )

    def __iter__(self) -> Iterator[tuple[str | None, str]]:
        for index in range(len(self._groups)):
            yield from self.group(index)

    def group(self, index: int) -> list[tuple[str | None, str]]:
        url = self._store.url(self._path)
        try:
            table = retried(lambda: self._read(index), url)
        except (OSError, pa.ArrowException) as err:
            raise UserError(f"{url} cannot be read: {first_line(err)}") from None
        if table.num_rows != self._groups[index]:
            raise UserError(f"{url}: expected {self._groups[index]} rows in row group {index}, found {table.num_rows}")
        return list(zip(table["id"].to_pylist(), table["place"].to_pylist(), strict=True))

    def _read(self, index: int) -> pa.Table:
        system, root = self._store.arrow()
        with system.open_input_file(f"{root}/{self._path}") as file:
            return open_shard(file, self._footer).read_row_group(index, columns=["id", "place"], use_threads=False)
