"""What do real samples of the data look like to a stage? Its targets, its length, its images, out of store or source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from dpa_ray.batch import Encoded
from dpa_ray.data import skip
from dpa_ray.data.catalog import Piece, digest, pieces
from dpa_ray.data.encode import Encoder
from dpa_ray.data.images import decode
from dpa_ray.data.ingest import Loader
from dpa_ray.data.known import Known
from dpa_ray.data.pixels import Geometry, levels
from dpa_ray.data.prepared import Prepared, find_prepared
from dpa_ray.data.sample import Sample
from dpa_ray.data.shards import size_bytes
from dpa_ray.data.sources import Rejected
from dpa_ray.doctor.findings import Check, number
from dpa_ray.errors import UserError
from dpa_ray.recipe import TRAINED_ON, Recipe, SourceSection
from dpa_ray.stages import skips
from dpa_ray.stages.supervision import sampled_rows
from dpa_ray.store.fs import Store

NUM_PARTS, ROWS_PER_PART = 4, 16
"""Parts of a source that is not prepared, evenly spread, and rows read at the start of each."""

Span = tuple[str, str]
"""A stretch of an encoded sample as text, and what it is: target, context or image."""

MAX_SPAN_CHARACTERS = 400


@dataclass
class Looked:
    """Some samples of a source."""

    digest: str
    num_rows: int  # an epoch's, before `fraction`, those in quarantine left out where they are known
    is_prepared: bool
    samples: list[Sample] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    num_quarantined: int = 0  # where it is prepared
    size_bytes: int = 0  # of the whole as shards, estimated unless it is prepared

    @property
    def num_looked_at(self) -> int:
        return len(self.samples) + len(self.rejected)


def look(store: Store | None, section: SourceSection, skip_ids: Collection[str] = ()) -> Looked:
    """Some samples of `section`: of the shards where `store` has them, else straight from the source, which is gone through
    without its images, as a run does. Nothing is written, and an S3 server that is away is not waited for.

    Samples that `skip_ids` names are left out: by id, and, as rows have their numbers there, in shards by DIGEST:ROW.
    Raises: UserError where it cannot be read.
    """
    found = pieces(section) if store is None else pieces(section, Known(store, write=False))
    prepared = None if store is None else find_prepared(store, digest(found))
    looked = _from_sources(found) if store is None or prepared is None else _from_shards(store, prepared, skip_ids)
    looked.samples = [sample for sample in looked.samples if sample.id not in skip_ids]
    return looked


def _from_shards(store: Store, prepared: Prepared, skip_ids: Collection[str]) -> Looked:
    loader = Loader(store, prepared, None, None, 0)  # type: ignore[arg-type]  # nothing is encoded by it
    rows = sampled_rows(prepared.row_groups)
    spread = np.unique(np.linspace(0, len(rows) - 1, NUM_PARTS * ROWS_PER_PART).round().astype(int))
    named = skip.rows_named(skip_ids, prepared.digest)
    found = skip.find(store, {"": prepared}, named) if named else skip.Found()  # its errors are another check's
    skipped = {each.row for each in found.skipped.get("", ())}
    samples = [loader.samples([rows[i]])[0] for i in spread if rows[i] not in skipped]
    return Looked(
        prepared.digest, prepared.num_rows, True, samples, num_quarantined=prepared.num_quarantined,
        size_bytes=sum(prepared.sizes_bytes),
    )  # fmt: skip


def _from_sources(found: list[Piece]) -> Looked:
    num_rows = sum(piece.scan.num_rows * piece.times for piece in found)
    looked = Looked(digest(found), num_rows, False)
    parts = [(piece, part) for piece in found for part in piece.scan.parts]
    chosen = np.unique(np.linspace(0, len(parts) - 1, NUM_PARTS).round().astype(int))
    per_part = NUM_PARTS * ROWS_PER_PART // len(chosen)
    for index in chosen:
        piece, part = parts[index]
        for _, sample in islice(piece.source.read(part), per_part):
            if isinstance(sample, Rejected):
                place = f"{piece.source.name}{sample.place}"
                looked.rejected.append(Rejected(sample.id, place, sample.reason, sample.detail))
            else:
                looked.samples.append(Sample(sample.id, f"{piece.source.name}{sample.place}", sample.turns, sample.images,
                                             sample.grounded))  # fmt: skip
    mean = sum(map(size_bytes, looked.samples)) / max(1, len(looked.samples))
    looked.size_bytes = int(mean * sum(piece.scan.num_rows for piece in found))
    return looked


def look_up_skipped(recipe: Recipe, store: Store | None, looked: Mapping[str, Looked], check: Check) -> None:
    """What do the entries of `data.skip_ids` mean, where all data that is trained on is prepared? `looked`: by set.

    Raises: RecipeError with every entry that means no sample; UserError where a shard cannot be read.
    """
    found = {}
    if store is not None and all(name in looked for name in TRAINED_ON):
        data = {name: (getattr(recipe.data, name), looked[name].digest) for name in TRAINED_ON}
        found = skips.find(recipe, store, data, make=False, report=check.note)
    if found:  # else data is not prepared: an entry without a sample is an error
        check.note(", ".join(f"{number(len(rows), 'row')} of data.{name}" for name, rows in found.items()))
        return
    check.skip(
        f"entries not looked up: {len(recipe.data.skip_ids)}. That takes prepared data; a run prepares it first, and ends where "
        "an entry means no sample"
    )


def judge_unusable(looked: Looked, max_fraction: float, check: Check) -> None:
    """Will so much be in quarantine that the run stops? From few samples, what chance alone does not explain."""
    num, bad = looked.num_rows + looked.num_quarantined, looked.num_quarantined
    if looked.is_prepared and bad > max_fraction * num:
        check.fail(
            f"{bad:,} of {num:,} samples are in quarantine; expected at most {max_fraction:.2%} (data.max_quarantined_fraction). "
            f"data/{looked.digest}/quarantine.jsonl in the store says why"
        )
    num, bad = looked.num_looked_at, len(looked.rejected)
    if not bad:
        return
    reasons = ", ".join(
        f"{reason}: {count}" for reason, count in Counter(r.reason for r in looked.rejected).most_common()
    )
    first = looked.rejected[0]
    told = (
        f"{bad} of {num} samples looked at cannot be used ({reasons}); a run stops where more than {max_fraction:.2%} cannot "
        f"(data.max_quarantined_fraction). The first: {first.place}: {first.reason}: {first.detail}"
    )
    expected = num * max_fraction
    if num >= looked.num_rows:  # all of them
        (check.fail if bad > expected or bad == num else check.note)(told)
        return
    sure = bad == num or bad > expected + 3 * max(1.0, expected**0.5)
    (check.fail if sure else check.warn)(told)


def check_images(sample: Sample, encoded: Encoded, encoder: Encoder, geometry: Geometry | None, side: int) -> None:
    """Has the sample one image token for each feature, and do its images come out as the tower takes them?

    Raises: UserError.
    """
    tokens = int((encoded.input_ids == encoder.image_token_id).sum())
    expected = encoded.num_images * encoder.num_image_tokens
    if tokens != expected:
        raise UserError(
            f"{sample.place}: expected {expected} image tokens, {encoder.num_image_tokens} for each of {encoded.num_images} "
            f"images, found {tokens}"
        )
    if geometry is None:
        return
    for image in sample.images[: encoded.num_images]:
        shape = levels(decode(image.data), geometry).shape
        if shape != (3, side, side):
            raise UserError(f"{sample.place}: {image.name}: expected (3, {side}, {side}) pixels, found {shape}")


def marked(encoded: Encoded, encoder: Encoder, tokenizer: Any) -> list[Span]:
    """The sample as its model reads it, in stretches; images as how many tokens they are, long stretches shortened."""
    spans: list[Span] = []
    ids, target = encoded.input_ids, encoded.target
    is_image = ids == encoder.image_token_id
    kind = np.where(is_image, 2, target.astype(int))
    starts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(ids)]
    read: list[int] = []  # without images: decoded from the start, as a tokenizer may drop a leading blank
    before = ""
    for start, stop in zip(starts, starts[1:], strict=False):
        if start == stop:
            continue
        if is_image[start]:
            spans.append((f"<image x {stop - start}>", "image"))
            continue
        read += ids[start:stop].tolist()
        whole = tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, before = whole[len(before) :], whole
        spans.append((_shortened(text), "target" if target[start] else "context"))
    return spans


def _shortened(text: str) -> str:
    if len(text) <= MAX_SPAN_CHARACTERS:
        return text
    half = MAX_SPAN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
