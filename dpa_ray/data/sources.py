"""What can data come from? LLaVA JSON or JSONL with a folder of images, and the built-in shapes; more will join.

A source is gone through once without its images (`scan`), which gives the digest that names the data, and cuts it into
parts that can be read apart: each becomes one shard, whoever makes it and when.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from dpa_ray.data import llava, shapes
from dpa_ray.data.files import Folder, absolute, chunks
from dpa_ray.data.images import ImageError, check
from dpa_ray.data.llava import Unusable
from dpa_ray.data.records import NotRecords, scan, scan_part
from dpa_ray.data.sample import ImageFile, Sample
from dpa_ray.data.shards import FORMAT_VERSION
from dpa_ray.data.threads import LruBytes, ordered_map
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceOptions, SourceSection

RULES_VERSION = 2
"""Of what is accepted and how it is written down: a change of that must change this, which is part of every digest."""

TARGET_PART_BYTES = 128 * 2**20
MAX_PART_ROWS = 16_384

SUPPORTED = "LLaVA JSON or JSONL (format: llava) with a folder of images, and builtin:shapes"
_THREADS = 8  # images fetched and checked at once in a part: S3 answers late, decoders release the GIL
_CACHE_BYTES = 64 * 2**20  # of images that several samples name


@dataclass(frozen=True)
class Part:
    """A run of a source's rows, which becomes one shard; [start, stop) are bytes of the source's file, if it has one."""

    index: int
    first_row: int
    num_rows: int
    start: int = 0
    stop: int = 0
    lines: bool = False  # JSONL


@dataclass(frozen=True)
class Scan:
    """A source gone through: its digest (16 hex digits), its rows, and the parts it is cut into."""

    digest: str
    num_rows: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Rejected:
    """A row for the quarantine."""

    id: str | None
    place: str
    reason: str
    detail: str


class Source(Protocol):
    """A source; picklable. `name` comes before the place of its samples."""

    name: str

    def scan(self) -> Scan: ...

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]: ...


def open_source(section: SourceSection) -> Source:
    """Raises: UserError for a source of a kind that is not supported."""
    if section.source.startswith("builtin:"):
        return Shapes(section.options or SourceOptions())
    kind = section.format or _format_of(section.source)
    if kind != "llava":
        raise UserError(f"{section.source}: expected {SUPPORTED}; found format {kind}, which is not supported yet")
    return Llava(section.source, section.images)


def source_digest(section: SourceSection) -> str:
    """What names the prepared data: the same for the same content, wherever it lies; reads no image.

    Raises: UserError where the source is missing or cannot be read.
    """
    return open_source(section).scan().digest


def _format_of(uri: str) -> str:
    suffix = PurePosixPath(uri).suffix.lower()
    return {".tar": "webdataset", ".tgz": "webdataset", ".parquet": "parquet"}.get(suffix, "llava")


def _digest(content: dict[str, Any]) -> str:
    content = {"rules": RULES_VERSION, "format": FORMAT_VERSION, **content}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Shapes:
    """builtin:shapes, generated."""

    name = ""

    def __init__(self, options: SourceOptions):
        self.options = options

    def scan(self) -> Scan:
        digest = _digest({"shapes": shapes.VERSION, "options": self.options.model_dump()})
        size = self.options.size
        starts = range(0, size, MAX_PART_ROWS)
        parts = tuple(Part(i, start, min(MAX_PART_ROWS, size - start)) for i, start in enumerate(starts))
        return Scan(digest, size, parts)

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        samples = itertools.islice(shapes.generate(self.options), part.first_row, part.first_row + part.num_rows)
        return zip(itertools.count(part.first_row), samples, strict=False)


class Llava:
    """LLaVA JSON or JSONL; image names are relative to `images`, which is the file's own folder unless given."""

    def __init__(self, uri: str, images: str | None):
        self.uri = absolute(uri)
        folder, _, self.name = self.uri.rpartition("/")
        self.images = Folder(absolute(images) if images is not None else folder or "/")

    def scan(self) -> Scan:
        """Also checks that the image folder is there, if any record names an image."""
        content = hashlib.sha256()
        rows = _Rows()
        try:
            found = scan(_hashed(chunks(self.uri), content))
            for record in found.records:
                rows.add(record.start, record.stop, llava.image_names(record.value))
        except NotRecords as err:
            raise UserError(f"{self.uri}: {err}") from None
        if not rows.num:
            raise UserError(f"{self.uri}: expected records, found an empty list")
        if rows.names:
            self.images.check()
        sizes = self.images.sizes(rows.names)
        listing = hashlib.sha256()
        for name in sorted(sizes):
            listing.update(f"{name}\0{sizes[name]}\n".encode())
        digest = _digest({"llava": content.hexdigest(), "images": listing.hexdigest()})
        return Scan(digest, rows.num, tuple(rows.parts(sizes, found.lines)))

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        data = b"".join(chunks(self.uri, part.start, part.stop))
        cache = LruBytes(_CACHE_BYTES)

        def read_one(item: tuple[int, Any]) -> tuple[int, Sample | Rejected]:
            row, value = item
            place, identity = f"#{row}", llava.record_id(value)
            try:
                parsed = llava.parse(value)
                images = [ImageFile(name, self._image(name, cache)) for name in parsed.image_names]
            except Unusable as err:
                return row, Rejected(identity, place, err.reason, err.detail)
            return row, Sample(identity, place, parsed.turns, images)

        records = ((part.first_row + i, r.value) for i, r in enumerate(scan_part(data, part.start, lines=part.lines)))
        return ordered_map(read_one, records, _THREADS)

    def _image(self, name: str, cache: LruBytes) -> bytes:
        """The bytes of an image that decodes. Raises: Unusable."""
        data = cache.get(name)
        if data is not None:
            return data
        try:
            data = self.images.read(name)
            check(data)
        except FileNotFoundError:
            raise Unusable("image_missing", f"expected an image at {self.images.uri}/{name}, found none") from None
        except ImageError as err:
            raise Unusable(err.reason, f"{name}: {err.detail}") from None
        cache.put(name, data)
        return data


def _hashed(parts: Iterator[bytes], into: Any) -> Iterator[bytes]:
    for part in parts:
        into.update(part)
        yield part


class _Rows:
    """Where rows stand and which images they name: some numbers a row, each name once."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._starts, self._stops, self._images, self._images_end = array("q"), array("q"), array("q"), array("q")

    @property
    def num(self) -> int:
        return len(self._starts)

    def add(self, start: int, stop: int, names: list[str]) -> None:
        self._starts.append(start)
        self._stops.append(stop)
        self._images.extend(self.names.setdefault(name, len(self.names)) for name in names)
        self._images_end.append(len(self._images))

    def parts(self, sizes: dict[str, int], lines: bool) -> Iterator[Part]:
        """Parts of about TARGET_PART_BYTES, and of MAX_PART_ROWS at most."""
        bytes_of = array("q", (max(sizes[name], 0) for name in self.names))  # a missing one takes nothing
        first, size, index, images_end = 0, 0, 0, 0
        for row in range(self.num):
            images = self._images[images_end : self._images_end[row]]
            images_end = self._images_end[row]
            extra = self._stops[row] - self._starts[row] + sum(bytes_of[i] for i in images)
            if row > first and (size + extra > TARGET_PART_BYTES or row - first >= MAX_PART_ROWS):
                yield Part(index, first, row - first, self._starts[first], self._stops[row - 1], lines)
                index, first, size = index + 1, row, 0
            size += extra
        yield Part(index, first, self.num - first, self._starts[first], self._stops[-1], lines)
