"""How do Parquet files become samples? In the layout of HF `datasets`; also with plain columns of bytes or paths.

image (or images)   {bytes, path}, raw bytes or a path, or a list of these; a path without bytes is read from `images`
conversations       turns as LLaVA has them, or messages with role and content; or
caption (or text)   a caption, alone or with a prompt before it
id                  optional
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.data import llava, rows
from dpa_ray.data.files import Folder, absolute, is_remote, open_uri, unsafe_name
from dpa_ray.data.known import NOTHING, Known
from dpa_ray.data.listing import Files
from dpa_ray.data.llava import Unusable
from dpa_ray.data.reading import File
from dpa_ray.data.retry import first_line
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import THREADS, Part, PartCutter, Rejected, Scan, checked, digest_of, to_sample
from dpa_ray.data.threads import ordered_map
from dpa_ray.errors import UserError
from dpa_ray.recipe import ColumnsSection

_IMAGES = ("image", "images", "jpg", "jpeg", "png", "webp")
_BATCH_ROWS = 16  # in memory at once, whatever the row groups are
_TEXT_ROWS = 1024
MAX_EXPANDED_BYTES, MAX_EXPANSION = 2**30, 500
"""A column of a row group may be larger than the first, or expand further than the second, not both."""
_BUFFER_BYTES = 2**20  # else a whole column of a row group is read at once


class Parquet:
    """Parquet files: one, a pattern, a glob or a folder of them."""

    def __init__(self, uri: str, images: str | None, columns: ColumnsSection | None):
        self.files = Files(uri, ".parquet")
        self.columns = columns or ColumnsSection()
        self.images = Folder(absolute(images) if images is not None else self.files.folder)
        self.name = self.files.name

    def scan(self, known: Known = NOTHING) -> Scan:
        """Reads the columns of text and the images' paths; of image bytes, how many there are in each row group."""
        content, cutter = hashlib.sha256(), PartCutter()
        columns = self.columns.model_dump(exclude_none=True)
        paths: dict[str, None] = {}
        for uri in self.files.uris():
            found = known.get(uri, self._scan_file, columns)
            content.update(f"{self.files.label(uri)}\0{found['digest']}\n".encode())
            cutter.next_file(uri)
            for group, (num_rows, size) in enumerate(found["groups"]):
                if num_rows:
                    cutter.add(group, group + 1, size, num_rows)
            paths.update(dict.fromkeys(found["paths"]))
        parts = cutter.finish()
        if not parts:
            raise UserError(f"{self.files.uri}: expected rows, found none")
        if paths:
            self.images.check()
            sizes = self.images.sizes(paths)
            content.update("".join(f"{name}\0{sizes[name]}\n" for name in sorted(sizes)).encode())
        return Scan(digest_of({"parquet": content.hexdigest(), "columns": columns}), cutter.num_rows, parts)

    def _scan_file(self, uri: str) -> dict[str, Any]:
        """What names a file's content, (rows, bytes) of its row groups, and images that may have to be read beside it."""
        content, groups = hashlib.sha256(), []
        paths: dict[str, None] = {}
        with _opened(uri) as file:
            _check_sizes(uri, file.metadata)
            names = _Names(uri, file.schema_arrow, self.columns)
            leaves = _Leaves(file, names)
            for batch in file.iter_batches(_TEXT_ROWS, columns=leaves.read):
                for row in batch.to_pylist():
                    content.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
                    if leaves.are_paths:
                        paths.update(dict.fromkeys(_paths(row.get(names.image or ""))))
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                size = sum(meta.column(i).total_uncompressed_size for i in leaves.data)
                content.update(f"{meta.num_rows} {size}\n".encode())
                groups.append((meta.num_rows, meta.total_byte_size))
        return {"digest": content.hexdigest(), "groups": groups, "paths": list(paths)}

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        with _opened(part.file) as file:
            names = _Names(part.file, file.schema_arrow, self.columns)
            before = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
            groups = list(range(part.start, part.stop))
            read = (
                (part.first_row + i, before + i, row)
                for i, row in enumerate(_rows(file, groups, names))
                if part.wants(part.first_row + i)
            )
            label = self.files.label(part.file)
            yield from ordered_map(
                lambda item: (item[0], self._sample(names, f"{label}#{item[1]}", item[2])), read, THREADS
            )

    def _sample(self, names: _Names, place: str, row: dict[str, Any]) -> Sample | Rejected:
        identity = row.get(names.id or "")
        try:
            images = _images(row.get(names.image or ""))
            safe = [_safe_name(name, data, index) for index, (name, data) in enumerate(images)]
            if names.conversations is not None:
                record = rows.conversation_record(identity, row[names.conversations], safe)
            else:
                prompt = row[names.prompt] if names.prompt is not None else None
                record = rows.caption_record(identity, row[names.text or ""], safe, prompt)
        except Unusable as err:
            return Rejected(llava.record_id({"id": identity}), place, err.reason, err.detail)
        return to_sample(record, place, lambda index, name: self._bytes(name, images[index][1]))

    def _bytes(self, name: str, data: bytes | None) -> bytes:
        if data is None:
            try:
                data = self.images.read(name)
            except FileNotFoundError:
                found = f"expected bytes, or an image at {self.images.uri}/{name}, found neither"
                raise Unusable("image_missing", found) from None
        return checked(name, data)


class _Names:
    """Which column is what in one file. Raises: UserError where that cannot be told."""

    def __init__(self, uri: str, schema: pa.Schema, columns: ColumnsSection):
        for key, name in columns.model_dump(exclude_none=True).items():
            if name not in schema.names:
                raise UserError(f"{uri}: expected a column {name!r} (columns.{key}), found {', '.join(schema.names)}")
        try:
            self.image = columns.image or rows.find_name(schema.names, _IMAGES)
            self.id = columns.id or rows.find_name(schema.names, rows.IDS)
            self.text, self.prompt, self.conversations = columns.text, columns.prompt, columns.conversations
            if self.text is None and self.conversations is None:
                self.conversations = rows.find_name(schema.names, rows.CONVERSATIONS)
            if self.text is None and self.conversations is None:
                self.text = rows.find_name(schema.names, rows.CAPTIONS)
        except Unusable as err:
            raise UserError(f"{uri}: {err.detail}") from None
        if self.text is None and self.conversations is None:
            raise UserError(
                f"{uri}: expected a column {' or '.join((*rows.CONVERSATIONS, *rows.CAPTIONS))}, found "
                f"{', '.join(schema.names)}: name it by columns (text or conversations)"
            )
        for name in (self.text, self.prompt):
            if name is not None and not _is_text(schema.field(name).type):
                raise UserError(f"{uri}: expected texts in the column {name!r}, found {schema.field(name).type}")

    @property
    def all(self) -> list[str]:
        names = (self.image, self.id, self.text, self.prompt, self.conversations)
        return [name for name in names if name is not None]


class _Leaves:
    """A file's columns as Parquet stores them: which to read in a scan, and where image bytes are.

    `are_paths`: may an image be a path alone?
    """

    def __init__(self, file: pq.ParquetFile, names: _Names):
        stored = [file.schema.column(i) for i in range(len(file.schema))]
        wanted = {  # a column's own name may have dots too
            name: [i for i, c in enumerate(stored) if f"{c.path}.".startswith(f"{name}.")] for name in names.all
        }
        image = wanted.get(names.image or "", [])
        self.data = [i for i in image if stored[i].physical_type == "BYTE_ARRAY" and not _is_path(stored[i])]
        self.read = [stored[i].path for columns in wanted.values() for i in columns if i not in self.data]
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        statistics = [group.column(i).statistics for group in groups for i in self.data]
        self.are_paths = not self.data or any(s is not None and s.has_null_count and s.null_count for s in statistics)


def _check_sizes(uri: str, metadata: Any) -> None:
    """Raises: UserError where a column says that it becomes far larger than any text or image does."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            stored, size = column.total_compressed_size, column.total_uncompressed_size
            if size > MAX_EXPANDED_BYTES and size > MAX_EXPANSION * max(1, stored):
                raise UserError(
                    f"{uri}: expected columns that expand at most {MAX_EXPANSION} times, found {column.path_in_schema!r} of "
                    f"row group {group} with {size} bytes in {stored}: a decompression bomb?"
                )


def _is_path(column: Any) -> bool:
    return column.logical_type.type == "STRING" or column.path.split(".")[-1] == "path"


def _paths(value: Any) -> list[str]:
    """The names of image files that a cell holds."""
    cells = value if isinstance(value, list) else [value]
    names = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    return [name for name in names if isinstance(name, str) and name and unsafe_name(name) is None]


def _images(value: Any) -> list[tuple[str | None, bytes | None]]:
    """(path, bytes) of each image of a cell. Raises: Unusable."""
    found: list[tuple[str | None, bytes | None]] = []
    for cell in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(cell, bytes):
            cell = {"bytes": cell}
        elif isinstance(cell, str):
            cell = {"path": cell}
        if not isinstance(cell, dict) or (cell.get("bytes") is None and cell.get("path") is None):
            raise Unusable("image_missing", "expected an image with bytes or a path, found one with neither")
        name, data = cell.get("path"), cell.get("bytes")
        if not isinstance(name, str | None) or not isinstance(data, bytes | None):
            kinds = f"{type(data).__name__} and {type(name).__name__}"
            raise Unusable("bad_record", f"expected an image's bytes and path, found {kinds}")
        found.append((name, data))
    return found


def _safe_name(name: str | None, data: bytes | None, index: int) -> str:
    """What an image is called: where its bytes are at hand, its path is a mere name."""
    if data is None:
        return name or ""
    base = posixpath.basename((name or "").replace("\\", "/"))
    return base if base and unsafe_name(base) is None else f"image-{index}"


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _rows(file: pq.ParquetFile, groups: list[int], names: _Names) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names.all, use_threads=False):
        yield from batch.to_pylist()


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Raises: UserError where it is no Parquet, or cannot be read now or within."""
    try:
        with File(uri) if is_remote(uri) else _local(uri) as raw:  # Arrow reads its own with several threads
            yield pq.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (
        OSError,
        pa.ArrowException,
        UnicodeDecodeError,
    ) as err:  # the last: a text, or a column's name, that is no UTF-8
        raise UserError(f"{uri}: expected Parquet, found a file that cannot be read: {first_line(err)}") from None


def _local(uri: str) -> Any:
    system, path = open_uri(uri)
    return system.open_input_file(path)
