"""What is a source? Here: what all have in common, LLaVA JSON or JSONL with a folder of images, the built-in shapes.

A source is gone through once without its images (`scan`), which gives the digest that names the data, and cuts it into
parts that can be read apart: each becomes one shard, whoever makes it and when. Tars are in webdataset.py, Parquet in
parquet.py; catalog.py says which of them a recipe means.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dpa_ray.data import llava, shapes
from dpa_ray.data.files import Folder, absolute
from dpa_ray.data.images import ImageError, check
from dpa_ray.data.known import NOTHING, Known
from dpa_ray.data.llava import Unusable
from dpa_ray.data.reading import chunks
from dpa_ray.data.records import NotRecords, scan, scan_part
from dpa_ray.data.sample import ImageFile, Sample
from dpa_ray.data.shards import FORMAT_VERSION
from dpa_ray.data.threads import LruBytes, ordered_map
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceOptions

RULES_VERSION = 3
"""Of what is accepted and how it is written down: a change of that must change this, which is part of every digest."""

TARGET_PART_BYTES = 128 * 2**20
MAX_PART_ROWS = 16_384

THREADS = 8  # images fetched and checked at once in a part: S3 answers late, decoders release the GIL
_CACHE_BYTES = 64 * 2**20  # of images that several samples name


@dataclass(frozen=True)
class Part:
    """A run of a source's rows, which becomes one shard.

    [start, stop) are bytes of the source's file (row groups of a Parquet one), if it has one; `file` is its URI where
    a source has several.
    """

    index: int
    first_row: int
    num_rows: int
    start: int = 0
    stop: int = 0
    lines: bool = False  # JSONL
    file: str = ""
    chosen: frozenset[int] | None = None  # of its rows, where not all are taken

    @property
    def num_chosen(self) -> int:
        return self.num_rows if self.chosen is None else len(self.chosen)

    def wants(self, row: int) -> bool:
        """Is this row, counted through the source, to be read?"""
        return self.chosen is None or row in self.chosen


@dataclass(frozen=True)
class Scan:
    """A source gone through: its digest (16 hex digits), its (chosen) rows, and the parts it is cut into."""

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

    def scan(self, known: Known = NOTHING) -> Scan: ...

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]: ...


def digest_of(content: dict[str, Any]) -> str:
    """16 hex digits of what a source holds, under the rules by which it is prepared."""
    content = {"rules": RULES_VERSION, "format": FORMAT_VERSION, **content}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def to_sample(record: Any, place: str, image: Callable[[int, str], bytes]) -> Sample | Rejected:
    """The sample of a LLaVA record; `image` gives the bytes of an image by its index and name, or raises Unusable."""
    try:
        parsed = llava.parse(record)
        images = [ImageFile(name, image(index, name)) for index, name in enumerate(parsed.image_names)]
    except Unusable as err:
        return Rejected(llava.record_id(record), place, err.reason, err.detail)
    return Sample(llava.record_id(record), place, parsed.turns, images)


def checked(name: str, data: bytes) -> bytes:
    """`data`, if it is an image that can be used. Raises: Unusable."""
    try:
        check(data)
    except ImageError as err:
        raise Unusable(err.reason, f"{name}: {err.detail}") from None
    return data


class PartCutter:
    """Parts of about TARGET_PART_BYTES and of MAX_PART_ROWS at most, each within one file, as rows are added."""

    def __init__(self, *, lines: bool = False) -> None:
        self.num_rows = 0
        self._lines, self._file = lines, ""
        self._parts: list[Part] = []
        self._first, self._start, self._stop, self._size = 0, 0, 0, 0

    def next_file(self, uri: str) -> None:
        self._cut()
        self._file = uri

    def add(self, start: int, stop: int, size_bytes: int, num_rows: int = 1) -> None:
        """Rows that stand at [start, stop) of the file and take about `size_bytes`."""
        held = self.num_rows - self._first
        if held and (self._size + size_bytes > TARGET_PART_BYTES or held + num_rows > MAX_PART_ROWS):
            self._cut()
        if self.num_rows == self._first:
            self._start = start
        self.num_rows += num_rows
        self._stop = stop
        self._size += size_bytes

    def finish(self) -> tuple[Part, ...]:
        self._cut()
        return tuple(self._parts)

    def _cut(self) -> None:
        if self.num_rows > self._first:
            num = self.num_rows - self._first
            part = Part(len(self._parts), self._first, num, self._start, self._stop, self._lines, self._file)
            self._parts.append(part)
        self._first, self._size = self.num_rows, 0


class Shapes:
    """builtin:shapes, generated."""

    name = ""

    def __init__(self, options: SourceOptions):
        self.options = options

    def scan(self, known: Known = NOTHING) -> Scan:
        digest = digest_of({"shapes": shapes.VERSION, "options": self.options.model_dump()})
        size = self.options.size
        starts = range(0, size, MAX_PART_ROWS)
        parts = tuple(Part(i, start, min(MAX_PART_ROWS, size - start)) for i, start in enumerate(starts))
        return Scan(digest, size, parts)

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        samples = itertools.islice(shapes.generate(self.options), part.first_row, part.first_row + part.num_rows)
        rows = zip(itertools.count(part.first_row), samples, strict=False)
        return (item for item in rows if part.wants(item[0]))


class Llava:
    """LLaVA JSON or JSONL; image names are relative to `images`, which is the file's own folder unless given."""

    def __init__(self, uri: str, images: str | None):
        self.uri = absolute(uri)
        folder, _, self.name = self.uri.rpartition("/")
        self.images = Folder(absolute(images) if images is not None else folder or "/")

    def scan(self, known: Known = NOTHING) -> Scan:
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
        digest = digest_of({"llava": content.hexdigest(), "images": listing.hexdigest()})
        return Scan(digest, rows.num, rows.parts(sizes, found.lines))

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        data = b"".join(chunks(self.uri, part.start, part.stop))
        cache = LruBytes(_CACHE_BYTES)

        def read_one(item: tuple[int, Any]) -> tuple[int, Sample | Rejected]:
            row, value = item
            return row, to_sample(value, f"#{row}", lambda _, name: self._image(name, cache))

        records = ((part.first_row + i, r.value) for i, r in enumerate(scan_part(data, part.start, lines=part.lines)))
        return ordered_map(read_one, (item for item in records if part.wants(item[0])), THREADS)

    def _image(self, name: str, cache: LruBytes) -> bytes:
        """The bytes of an image that decodes. Raises: Unusable."""
        data = cache.get(name)
        if data is not None:
            return data
        try:
            data = checked(name, self.images.read(name))
        except FileNotFoundError:
            raise Unusable("image_missing", f"expected an image at {self.images.uri}/{name}, found none") from None
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

    def parts(self, sizes: dict[str, int], lines: bool) -> tuple[Part, ...]:
        """Where the rows are cut, the images counted."""
        bytes_of = array("q", (max(sizes[name], 0) for name in self.names))  # a missing one takes nothing
        cutter, images_end = PartCutter(lines=lines), 0
        for row in range(self.num):
            images = self._images[images_end : self._images_end[row]]
            images_end = self._images_end[row]
            size = self._stops[row] - self._starts[row] + sum(bytes_of[i] for i in images)
            cutter.add(self._starts[row], self._stops[row], size)
        return cutter.finish()
