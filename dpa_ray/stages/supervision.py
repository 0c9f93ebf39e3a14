"""Is there something to learn in the prepared data, once a stage's own template and max_length have been at it?"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from dpa_ray.batch import Encoded
from dpa_ray.data.encode import Encoder
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepared import Prepared, StoreLike
from dpa_ray.data.sample import Sample
from dpa_ray.errors import UserError

SAMPLED_GROUPS, ROWS_PER_GROUP = 16, 16
"""Row groups looked into, evenly spread, and rows of each: seconds on S3, whatever the size of the data."""

MIN_FRACTION = 0.005
"""Of text tokens that are targets. One-word answers to long questions have 0.02 and more; less means that answers are
cut off by max_length, or that the question is where the answer should be."""

MAX_CHAT_FRACTION = 0.995
"""Of a chat's text tokens. Headers and questions are never targets, and even 2,000 tokens of answer have more than ten of
them before it; more means that questions are trained on. Captions (stages 1 and 2) are targets as a whole."""


@dataclass(frozen=True)
class Supervision:
    """What a sample of the data says. Image tokens are not counted: how many there are says nothing of the text."""

    num_samples: int
    num_text_tokens: int
    num_targets: int
    nothing_to_learn: tuple[str, ...]  # places of samples without a target

    @property
    def fraction(self) -> float:
        return self.num_targets / max(1, self.num_text_tokens)


def sampled_rows(row_groups: list[int]) -> list[int]:
    """Rows of some row groups, evenly spread, the first and the last group among them."""
    starts = np.cumsum([0, *row_groups])
    chosen = np.unique(np.linspace(0, len(row_groups) - 1, SAMPLED_GROUPS).round().astype(int))
    return [int(starts[g]) + i for g in chosen for i in range(min(ROWS_PER_GROUP, row_groups[g]))]


def measure(
    store: StoreLike, prepared: Prepared, encoder: Encoder, retry_s: float = 0.0, skipped: Collection[int] = ()
) -> Supervision:
    """Encode a sample of `prepared` (images are not decoded) without the rows `skipped`.

    Raises: UserError where a sample cannot be encoded.
    """
    loader = Loader(store, prepared, encoder, None, 0, retry_s=retry_s)
    rows = [row for row in sampled_rows(prepared.row_groups) if row not in skipped]
    samples = (loader.samples([row])[0] for row in rows)  # one by one: memory holds the images of a row group
    return of_samples(((sample, encoder(sample)) for sample in samples), encoder)


def of_samples(encoded_samples: Iterable[tuple[Sample, Encoded]], encoder: Encoder) -> Supervision:
    """What samples say that `encoder` has encoded."""
    num_samples = num_text = num_targets = 0
    nothing = []
    for sample, encoded in encoded_samples:
        num_samples += 1
        num_text += int((encoded.input_ids != encoder.image_token_id).sum())
        num_targets += int(encoded.target.sum())
        if not encoded.target.any():
            nothing.append(sample.place)
    return Supervision(num_samples, num_text, num_targets, tuple(nothing))


def check(found: Supervision, *, stage: str, encoder: Encoder, source: str) -> str | None:
    """Something to tell the user about samples with nothing to learn, or None.

    Raises: UserError where hardly any text token is a target, or (in a chat) nearly every one.
    """
    where = f"{source}: of {found.num_text_tokens:,} text tokens in {found.num_samples:,} samples that were looked at,"
    override = "if it is meant, set data.check_supervision=false"
    cut = (
        f"{len(found.nothing_to_learn):,} of {found.num_samples:,} samples looked at have nothing left to learn after "
        f"truncation to stages.{stage}.max_length={encoder.max_length} (the first: {found.nothing_to_learn[0]})"
        if found.nothing_to_learn
        else ""
    )
    if found.fraction < MIN_FRACTION:
        raise UserError(
            f"{where} {found.num_targets:,} are trained on ({found.fraction:.2%}); expected at least "
            f"{MIN_FRACTION:.1%}. {cut + '; raise it' if cut else 'Are questions and answers swapped?'}; {override}"
        )
    if encoder.template == "chat" and found.fraction > MAX_CHAT_FRACTION:
        raise UserError(
            f"{where} {found.num_targets:,} are trained on ({found.fraction:.2%}); expected at most "
            f"{MAX_CHAT_FRACTION:.1%}, as questions and headers of turns are none: is the whole conversation in the gpt "
            f"turn? {override}"
        )
    return f"{source}: {cut}; they are listed in the run's quarantine.jsonl" if cut else None
