"""What is in a prepared shard? A Parquet file of whole samples, image bytes as they came, in row groups small enough to
seek; each page has a checksum, and the footer's digest is in the manifest, so that no flipped bit is ever trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.sizes import size_of, to_footer

FORMAT_VERSION = 3
MAX_GROUP_ROWS = 64
"""A reader takes in whole row groups: these bound what it reads beside the row it wants. (Rows of a window are dealt out to all
decode processes, so that of many processes none needs a second row of the same group.)"""
MAX_GROUP_BYTES = 2**19

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # in the source, quarantined ones counted
        pa.field("id", pa.string()),
        pa.field("place", pa.string(), nullable=False),
        pa.field("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.large_string())]))),
        pa.field("images", pa.list_(pa.struct([("name", pa.string()), ("data", pa.large_binary())]))),
        pa.field("grounded", pa.list_(pa.struct([("turn", pa.int32()), ("start", pa.int32()), ("end", pa.int32())]))),
    ],
    metadata={"dpa_ray.format": str(FORMAT_VERSION)},
)


def size_bytes(sample: Sample) -> int:
    """About what a sample takes in a shard."""
    texts = sum(len(turn.text) for turn in sample.turns)
    return texts + sum(len(image.data) for image in sample.images) + 64


def to_row(row: int, sample: Sample) -> dict[str, Any]:
    """A sample as a row of SCHEMA."""
    return {
        "row": row,
        "id": sample.id,
        "place": sample.place,
        "turns": [{"role": turn.role, "text": turn.text} for turn in sample.turns],
        "images": [{"name": image.name, "data": image.data} for image in sample.images],
        "grounded": [{"turn": t, "start": s, "end": e} for t, s, e in sample.grounded],
    }


def from_row(row: dict[str, Any], source_name: str) -> Sample:
    """The sample of a row of SCHEMA; `source_name` comes before its place."""
    return Sample(
        id=row["id"],
        place=source_name + row["place"],
        turns=[Turn(turn["role"], turn["text"]) for turn in row["turns"]],
        images=[ImageFile(image["name"], image["data"]) for image in row["images"]],
        grounded=[(g["turn"], g["start"], g["end"]) for g in row["grounded"]],
    )


def write_shard(path: Path, samples: Iterable[tuple[int, Sample]]) -> list[int]:
    """Write (row, sample) pairs to `path`; returns the rows of each row group, empty (and no file) without samples.

    The same samples give the same bytes. Memory holds one row group.
    """
    groups: list[int] = []
    rows: list[dict[str, Any]] = []
    sizes: list[int] = []
    size = 0
    writer: pq.ParquetWriter | None = None
    try:
        for row, sample in samples:
            extra = size_bytes(sample)
            if rows and (len(rows) >= MAX_GROUP_ROWS or size + extra > MAX_GROUP_BYTES):
                writer = _flush(writer, path, rows, groups)
                rows, size = [], 0
            rows.append(to_row(row, sample))
            sizes.append(size_of(sample))
            size += extra
        if rows:
            writer = _flush(writer, path, rows, groups)
        if writer is not None:
            writer.add_key_value_metadata(to_footer(sizes))
    finally:
        if writer is not None:
            writer.close()
    return groups


def _flush(
    writer: pq.ParquetWriter | None, path: Path, rows: list[dict[str, Any]], groups: list[int]
) -> pq.ParquetWriter:
    if writer is None:
        # images are compressed as they are, texts are small: compression would cost readers more than it saves
        writer = pq.ParquetWriter(
            path, SCHEMA, compression="NONE", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    groups.append(len(rows))
    return writer
