"""Of what does a mixture consist, and which rows of a source are taken? The same rows always, whatever a run's seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from dpa_ray.data.cursor import permutation
from dpa_ray.data.files import absolute
from dpa_ray.data.known import NOTHING, Known
from dpa_ray.data.reading import chunks
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import Part, Rejected, Scan, Source, digest_of
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceEntry, SourceSection
from dpa_ray.recipe_errors import key_path, message
from dpa_ray.recipe_sources import format_of, is_mixture_file, parse_take
from dpa_ray.recipe_yaml import from_yaml

_KEYS = {"json_path", "sampling_strategy", "source", "images", "format", "columns", "options", "take", "weight"}


def entries(section: SourceSection) -> list[SourceEntry]:
    """The sources of a section. Raises: UserError where a mixture's file cannot be read."""
    if isinstance(section.source, list):
        return section.source
    if is_mixture_file(section.source):
        return _from_file(absolute(section.source), section.images)
    return [SourceEntry(**section.model_dump(include={"source", "images", "format"}), columns=section.columns,
                        options=section.options)]  # fmt: skip


def _from_file(uri: str, images: str | None) -> list[SourceEntry]:
    """LLaVA-NeXT's layout: datasets: [{json_path, sampling_strategy: all | first:N | end:N | random:P%}].

    An entry may also have the keys of a recipe's; a relative path is relative to the file's folder.
    """
    try:
        values = from_yaml(b"".join(chunks(uri)).decode("utf-8-sig"))
    except ValueError as err:
        raise UserError(f"{uri}: not readable as YAML: {err}") from None
    items = values.get("datasets") if isinstance(values, dict) else None
    if not isinstance(items, list) or not items:
        raise UserError(f"{uri}: expected datasets: [{{json_path: ..., sampling_strategy: ...}}, ...], found none")
    found = []
    for number, item in enumerate(items):
        where = f"{uri}: datasets.{number}"
        if not isinstance(item, dict) or not ("json_path" in item) ^ ("source" in item):
            raise UserError(f"{where}: expected an entry with json_path (or source), found {str(item)[:80]}")
        unknown = set(item) - _KEYS
        if unknown:
            raise UserError(
                f"{where}: expected keys out of {', '.join(sorted(_KEYS))}, found {', '.join(sorted(unknown))}"
            )
        try:
            found.append(SourceEntry.model_validate(_entry(dict(item), uri.rpartition("/")[0], images)))
        except ValidationError as err:
            first = err.errors(include_url=False)[0]
            place = key_path(first["loc"])
            raise UserError(f"{where}: {place and place + ': '}{message(first, SourceEntry)}") from None
    return found


def _entry(item: dict[str, Any], folder: str, images: str | None) -> dict[str, Any]:
    """An entry of a file in a recipe's own terms."""
    source, strategy = item.pop("json_path", None), item.pop("sampling_strategy", None)
    if source is not None:
        item["source"] = source
    if strategy not in (None, "all"):
        item["take"] = strategy
    for key in ("source", "images"):
        value = item.get(key)
        if isinstance(value, str) and "://" not in value and not value.startswith(("/", "~", "builtin:")):
            item[key] = f"{folder}/{value}"
    uri = str(item.get("source"))
    if images is not None and not uri.startswith("builtin:") and (item.get("format") or format_of(uri)) != "webdataset":
        item.setdefault("images", images)
    return item


def share(fraction: float) -> str:
    """The `take` of a weight's fraction: a fixed choice of so much of the rows."""
    return f"random:{round(100 * fraction, 6):g}%"


class Taken:
    """Some rows of a source, which are prepared alone."""

    def __init__(self, source: Source, take: str):
        self.source, self.take, self.name = source, take, source.name

    def scan(self, known: Known = NOTHING) -> Scan:
        return self.scan_of(self.source.scan(known))

    def scan_of(self, whole: Scan) -> Scan:
        """What is taken of a source gone through; all of it is the source itself."""
        kind, number, is_percent = parse_take(self.take)
        available = np.concatenate([_rows(part) for part in whole.parts])
        num = max(1, math.floor(len(available) * number / 100 + 0.5)) if is_percent else int(number)
        if num >= len(available):
            return whole
        if kind == "random":
            picked = np.sort(available[permutation(len(available), 0)[:num]])
        else:
            picked = available[:num] if kind == "first" else available[-num:]
        parts = []
        for part in whole.parts:
            first, last = np.searchsorted(picked, [part.first_row, part.first_row + part.num_rows])
            if last > first:
                parts.append(replace(part, chosen=frozenset(picked[first:last].tolist())))
        return Scan(digest_of({"of": whole.digest, "take": [kind, num]}), num, tuple(parts))

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        return self.source.read(part)


def _rows(part: Part) -> np.ndarray:
    """(n,) int64: the rows of a part that are taken, rising."""
    if part.chosen is None:
        return np.arange(part.first_row, part.first_row + part.num_rows)
    return np.array(sorted(part.chosen), np.int64)
