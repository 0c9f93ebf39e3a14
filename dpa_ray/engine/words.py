"""Which words did a stage learn, and which did it unlearn? Their losses before and after it, for its artifact.

The nll of a word is the sum over its tokens, - log P(word | what comes before it), so that it can be compared between
tokenizers; its p - q is the mean over them, as that is what a token is weighed by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import shares
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepared import Prepared
from dpa_ray.data.words import join, pieces, runs
from dpa_ray.engine.held_out import held_out_loader
from dpa_ray.engine.logs import WORDS_PREFIX
from dpa_ray.engine.protocol import barrier, from_rank_0, gathered, rank, world_size
from dpa_ray.errors import UserError
from dpa_ray.model.held_out import both_scores
from dpa_ray.model.step import StepModule

FILE = "words.parquet"
"""In a stage's artifact: a row for each word, see SCHEMA; in its metadata `samples` (HELD_OUT or TRAINING), `num_samples`
and `digest`, of the data that the words are of."""

SCHEMA = pa.schema(
    [
        pa.field("word", pa.string(), nullable=False),  # in lower case
        pa.field("count", pa.int32(), nullable=False),  # how often it is in the samples
        pa.field("num_tokens", pa.float32(), nullable=False),  # mean, as are the following
        pa.field("nll_before", pa.float32(), nullable=False),  # by the model that the stage began with
        pa.field("nll_after", pa.float32(), nullable=False),
        pa.field("gain", pa.float32(), nullable=False),  # p - q by the model that the stage ended with
        pa.field("visual", pa.float32(), nullable=False),  # share of those known to be shown by the image
    ]
)

HELD_OUT, TRAINING = "held-out", "training"

MAX_SAMPLES = 128
"""Evenly from the data: two passes of so many are seconds beside a stage."""

MAX_BATCH = 32


@dataclass(frozen=True)
class SampleLosses:
    """What one look found of the N targets of one sample, in their order."""

    row: int
    words: list[tuple[str, slice]]  # which targets make up which word
    visual: np.ndarray  # (N,) bool
    nll: np.ndarray  # (N,) float32
    gain: np.ndarray  # (N,) float32

    def to_line(self) -> str:
        words = [[word, tokens.start, tokens.stop] for word, tokens in self.words]
        arrays = {name: getattr(self, name).tolist() for name in ("visual", "nll", "gain")}
        return json.dumps({"row": self.row, "words": words, **arrays}) + "\n"

    @classmethod
    def of_line(cls, line: str) -> SampleLosses:
        """The same numbers to the bit."""
        found = json.loads(line)
        words = [(word, slice(start, stop)) for word, start, stop in found["words"]]
        nll, gain = (np.array(found[name], np.float32) for name in ("nll", "gain"))
        return cls(found["row"], words, np.array(found["visual"], bool), nll, gain)


class Words:
    """The samples of one stage whose words are looked at, before it and after it.

    Every rank has to make each look; none draws a number or trains. A stage does not fail for want of them: where a sample
    cannot be read, `note` is told, and no table comes of it.
    """

    def __init__(
        self, module: StepModule, loader: Loader, held_out: Prepared | None, batch_size: int, device: torch.device,
        note: Callable[[str], None],
    ):  # fmt: skip
        """`loader` reads the stage's data; where there is none held out, they are its own samples. `batch_size`: at most."""
        self.module, self.device, self.note = module, device, note
        self.samples = TRAINING if held_out is None else HELD_OUT
        own = replace(loader, blind=None, packing=False)
        self.loader = loader = own if held_out is None else held_out_loader(loader, held_out)
        every = np.linspace(0, loader.prepared.num_rows - 1, MAX_SAMPLES).astype(int)
        self.rows = np.array([row for row in np.unique(every).tolist() if row not in loader.skipped], int)
        self.passes = shares(self.rows, world_size(), min(batch_size, MAX_BATCH))[rank()]
        self.before: list[SampleLosses] | None = None
        self.after: list[SampleLosses] | None = None

    @property
    def file(self) -> str:
        """A checkpoint's file with the look before the stage. A stage may go on with other held-out data, which its key
        leaves out, and would compare one look at these samples with another at those."""
        samples = json.dumps([self.loader.prepared.digest, self.rows.tolist()])
        return f"{WORDS_PREFIX}{hashlib.sha256(samples.encode()).hexdigest()[:16]}.jsonl"

    def look_before(self) -> dict[str, list[str]]:
        """With the model that the stage begins with; gives `file` and lines for `resume`, none where nothing came of it."""
        self.before = self._look()
        return {self.file: [sample.to_line() for sample in self.before]} if self.before else {}

    def resume(self, lines: list[str]) -> None:
        """Where an attempt before this one looked: what it found, which rank 0 has."""
        self.before = [SampleLosses.of_line(line) for line in from_rank_0(lines)]

    def look_after(self) -> None:
        """With the model that it ends with."""
        if self.before is not None:
            self.after = self._look()

    def write(self, folder: Path) -> None:
        """FILE in `folder`, where both looks were made."""
        if self.before is not None and self.after is not None:
            about = {"samples": self.samples, "num_samples": len(self.rows), "digest": self.loader.prepared.digest}
            made = table(self.before, self.after)
            made = made.replace_schema_metadata({key: str(value) for key, value in about.items()})
            pq.write_table(made, folder / FILE, compression="zstd")

    def _look(self) -> list[SampleLosses] | None:
        batches: list[Batch] = []
        problem = None
        try:
            batches = [self.loader.load(rows, 0) for rows in self.passes]
        except UserError as err:
            problem = str(err)
        barrier()  # reading may take one worker longer than a collective may
        problems = [told for told in gathered(problem) if told is not None]
        if problems:  # before any forward: no rank may be in one alone
            if rank() == 0:
                self.note(f"the report will show no losses by word: {problems[0]}")
            return None
        found = [sample for batch in batches for sample in self._samples(batch)]
        return sorted((sample for part in gathered(found) for sample in part), key=lambda sample: sample.row)

    def _samples(self, batch: Batch) -> list[SampleLosses]:
        found = both_scores(self.module, batch.to(self.device))
        gain = found.gain * self.module.is_vlm  # where no image can be seen, it adds nothing
        rows, columns, nll, gain = (x.cpu() for x in (found.row, found.column, -found.seen.log_prob, gain))
        samples = []
        for place, (_, row) in enumerate(batch.rows):
            mine = rows == place
            column = columns[mine]
            ids, turns = batch.labels[place, column].tolist(), batch.turn[place, column].tolist()
            words = [
                (word, slice(run.start + tokens.start, run.start + tokens.stop))
                for run in runs(column.tolist(), turns)
                for word, tokens in join(pieces(self.loader.encoder.tokenizer, ids[run]))
            ]
            numbers = (batch.grounded[place, column], nll[mine], gain[mine])
            samples.append(SampleLosses(row, words, *(values.numpy() for values in numbers)))
        return samples


def table(before: Sequence[SampleLosses], after: Sequence[SampleLosses]) -> pa.Table:
    """Both looks at the same samples by word, the most frequent first; see SCHEMA."""
    sums: dict[str, np.ndarray] = {}
    for first, last in zip(before, after, strict=True):
        for word, tokens in last.words:
            numbers = (
                1, tokens.stop - tokens.start, first.nll[tokens].sum(dtype=float), last.nll[tokens].sum(dtype=float),
                last.gain[tokens].mean(dtype=float), last.visual[tokens].any(),
            )  # fmt: skip
            sums[word] = sums.get(word, 0) + np.array(numbers, float)
    order = sorted(sums, key=lambda word: (-sums[word][0], word))
    columns = np.array([sums[word] for word in order]).reshape(-1, 6).T
    means = columns[1:] / np.maximum(columns[0], 1)
    arrays = [pa.array(order, pa.string()), *(pa.array(c, pa.float32()) for c in [columns[0], *means])]
    arrays[1] = arrays[1].cast(pa.int32())
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def read(file: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Metadata and rows of a FILE. Raises: ValueError where it is not what `Words.write` writes."""
    made = pq.read_table(file)
    if not made.schema.remove_metadata().equals(SCHEMA):
        raise ValueError(f"expected the columns {', '.join(SCHEMA.names)}, found {', '.join(made.schema.names)}")
    metadata = {key.decode(): value.decode() for key, value in (made.schema.metadata or {}).items()}
    return metadata, made.to_pylist()
