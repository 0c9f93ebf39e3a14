"""Which sources does a recipe mean? One, or the pieces of a mixture, each with a digest of its own."""

from __future__ import annotations

from dataclasses import dataclass

from dpa_ray.data.known import NOTHING, Known
from dpa_ray.data.mixture import Taken, entries, share
from dpa_ray.data.parquet import Parquet
from dpa_ray.data.sources import Llava, Scan, Shapes, Source, digest_of
from dpa_ray.data.webdataset import WebDataset
from dpa_ray.recipe import SourceEntry, SourceOptions, SourceSection
from dpa_ray.recipe_sources import format_of


@dataclass(frozen=True)
class Piece:
    """What is prepared as one: a source gone through, and how many times an epoch takes it."""

    entry: SourceEntry
    source: Source
    scan: Scan
    times: int


def open_source(section: SourceEntry | SourceSection) -> Source:
    """The source of an entry, without regard to what is taken of it."""
    uri = section.source
    assert isinstance(uri, str)
    if uri.startswith("builtin:"):
        return Shapes(section.options or SourceOptions())
    kind = section.format or format_of(uri)
    if kind == "webdataset":
        return WebDataset(uri, section.columns)
    if kind == "parquet":
        return Parquet(uri, section.images, section.columns)
    return Llava(uri, section.images)


def pieces(section: SourceSection, known: Known = NOTHING) -> list[Piece]:
    """What `section` consists of, in order. Raises: UserError where a source is missing or cannot be read."""
    found = []
    for entry in entries(section):
        source = open_source(entry)
        if entry.take is not None:
            source = Taken(source, entry.take)
        scan = source.scan(known)
        times, rest = int(entry.weight), entry.weight - int(entry.weight)
        if times:
            found.append(Piece(entry, source, scan, times))
        if rest:
            part = Taken(source, share(rest))
            found.append(Piece(entry, part, part.scan_of(scan), 1))
    return found


def digest(found: list[Piece]) -> str:
    """What names the data of these pieces: their own digests and how often each is taken, in order."""
    if len(found) == 1 and found[0].times == 1:
        return found[0].scan.digest
    return digest_of({"mixture": [[piece.scan.digest, piece.times] for piece in found]})


def source_digest(section: SourceSection, known: Known = NOTHING) -> str:
    """What names the prepared data: the same for the same content, wherever it lies; reads no image.

    Raises: UserError where a source is missing or cannot be read.
    """
    return digest(pieces(section, known))
