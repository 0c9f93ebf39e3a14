"""What is written down of a stage while it trains: metrics, samples that had nothing to learn, samples taken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.skip import Skipped
from dpa_ray.engine.blind_job import chosen_rows
from dpa_ray.engine.protocol import rank, world_size
from dpa_ray.errors import UserError
from dpa_ray.report.metrics import MetricsLog
from dpa_ray.stages.spec import TrainTask
from dpa_ray.store.fs import Store

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
WORDS_PREFIX = "words_before-"
"""Of the file in a checkpoint with what `Words.look_before` found; its name says of which samples."""

NOTHING_TO_LEARN, SKIPPED = "nothing_to_learn", "skipped"
"""Reasons of a run's own quarantine: known only with a tokenizer, when the data has long been prepared; and the recipe's
`data.skip_ids`."""


@dataclass
class Before:
    """What an earlier attempt at the stage wrote down until the checkpoint that this one goes on from."""

    metrics: list[str] = field(default_factory=list)  # lines of metrics.jsonl
    samples: list[str] = field(default_factory=list)  # lines of samples.jsonl
    words: dict[str, list[str]] = field(default_factory=dict)  # WORDS_PREFIX's file, if any, and its lines
    untaught: dict[int, tuple[str | None, str]] = field(default_factory=dict)  # (id, place) by row
    resumed_from: list[int] = field(default_factory=list)  # the step of each checkpoint that was gone on from
    wall_time_s: float = 0.0
    saving_s: float = 0.0


class Recorder:
    """Each step's metrics to the run's metrics.jsonl, the driver, and the artifact; sample identities on demand."""

    def __init__(
        self, store: Store, task: TrainTask, cursor: Cursor, tell: Callable[..., None], before: Before, begun: float
    ):
        """`tell` brings an event, as Worker.tell does, to the driver; `begun`: this attempt, by time.perf_counter."""
        self.tell = tell
        self.begun = begun
        self.before = before
        self.saving_s = before.saving_s
        self.lines = list(before.metrics)
        self.cursor, self.task = cursor, task
        self.log = MetricsLog(store, task.run_path, note=lambda text: tell("note", text=text))
        self.untaught = UntaughtLog(store, task)
        self.samples = SampleLog(store, task, cursor) if task.recipe.debug.record_samples else None
        if rank() == 0:
            self.untaught.found.update(before.untaught)
            self.log.start(task.stage, [json.loads(line) for line in self.lines])
        if self.samples is not None:
            self.samples.lines += before.samples

    def record(self, metrics: dict[str, Any], batches: list[Batch]) -> None:
        self.untaught.add(batches)
        if self.samples is not None:
            self.samples.add(metrics["step"], batches)
        if rank() != 0:
            return
        self.log.append(metrics)
        self.lines.append(json.dumps(metrics) + "\n")
        self.tell("step", **metrics, saving_s=self.saving_s)

    def loss(self, number: int) -> float | None:
        """Of the `number`-th step that was recorded (-1: the last), on rank 0."""
        return json.loads(self.lines[number])["loss"] if self.lines else None

    def snapshot(self) -> dict[str, list[str]]:
        """What is written down so far, for a checkpoint, by file."""
        lines = {METRICS: list(self.lines)}
        if self.samples is not None:
            lines[SAMPLES] = list(self.samples.lines)
        return lines | self.before.words

    def meta(self) -> dict[str, Any]:
        """How the stage went so far, all attempts together; steps that were lost and made again are not in it."""
        return {
            "wall_time_s": self.before.wall_time_s + time.perf_counter() - self.begun,
            "saving_s": self.saving_s, "resumed_from": self.before.resumed_from,
        }  # fmt: skip

    def _skipped(self) -> list[Skipped]:
        """Those of the recipe's that the stage's steps take."""
        if not self.task.skipped:
            return []
        taken = chosen_rows(self.cursor, self.task.num_steps, self.task.data.num_rows)
        return [skipped for skipped in self.task.skipped if taken[skipped.row]]

    def close(self) -> None:
        self.untaught.close(self._skipped())
        if rank() == 0:
            self.log.flush()
            if self.samples is not None:
                self.samples.flush()


class UntaughtLog:
    """runs/<name>/quarantine.jsonl: the samples that a stage took and did not learn from: those that had nothing to learn
    (all targets cut off), and those that the recipe skips.

    They pass through the model without weight, so that neither the cursor nor the ranks' passes depend on the template.
    """

    def __init__(self, store: Store, task: TrainTask):
        self.store = store
        self.stage = task.stage
        self.digest = task.data.digest
        self.max_length = getattr(task.recipe.stages, task.stage).max_length
        self.path = f"{task.run_path}/quarantine.jsonl"
        self.found: dict[int, tuple[str | None, str]] = {}  # (id, place) by row

    def add(self, batches: list[Batch]) -> None:
        self.found.update({row: (name, place) for b in batches for row, name, place in b.untaught})

    def close(self, skipped: Sequence[Skipped] = ()) -> None:
        """Gather from all ranks, add the `skipped`, and write this stage's lines behind those of the other stages."""
        every: list[Any] = [self.found]
        if world_size() > 1:
            every = [None] * world_size()
            torch.distributed.all_gather_object(every, self.found)
        if rank() != 0:
            return
        whole = {row: sample for found in every for row, sample in found.items()}
        cut_off = f"no target left within stages.{self.stage}.max_length={self.max_length}"
        entries = [(row, name, place, NOTHING_TO_LEARN, cut_off) for row, (name, place) in whole.items()]
        entries += [(s.row, s.id, s.place, SKIPPED, "the recipe's data.skip_ids") for s in skipped]
        lines = [
            json.dumps(
                {"stage": self.stage, "data": self.digest, "row": row, "id": name, "place": place,
                 "reason": reason, "detail": detail},
                ensure_ascii=False,
            ) + "\n"
            for row, name, place, reason, detail in sorted(entries, key=lambda entry: entry[0])
        ]  # fmt: skip
        rewrite_stage(self.store, self.path, self.stage, lines)


class SampleLog:
    """runs/<name>/samples.jsonl: which samples each (stage, step) took, over all ranks, in the cursor's order."""

    def __init__(self, store: Store, task: TrainTask, cursor: Cursor):
        self.cursor = cursor
        self.store = store
        self.stage = task.stage
        self.path = f"{task.run_path}/{SAMPLES}"
        self.lines: list[str] = []

    def add(self, step: int, batches: list[Batch]) -> None:
        mine = [(row, name) for b in batches for row, name in zip(b.rows, b.ids, strict=True)]
        every: list[Any] = [mine]
        if world_size() > 1:
            every = [None] * world_size()
            torch.distributed.all_gather_object(every, mine)
        epoch, inside = divmod(step - 1, self.cursor.steps_per_epoch)
        place = {int(row): number for number, row in enumerate(self.cursor.rows(epoch, inside))}
        taken = sorted(chain.from_iterable(every), key=lambda sample: place[sample[0][1]])
        entry = {
            "stage": self.stage, "step": step,
            "rows": [list(row) for row, _ in taken], "ids": [name for _, name in taken],
        }  # fmt: skip
        self.lines.append(json.dumps(entry, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Write this stage's lines behind those of the other stages."""
        rewrite_stage(self.store, self.path, self.stage, self.lines)


def rewrite_stage(store: Store, path: str, stage: str, lines: list[str]) -> None:
    """Put `lines` in place of `stage`'s in a JSONL file of several stages, at its end; an empty file is not made."""
    old = store.read_bytes(path).split(b"\n") if store.exists(path) else []
    try:
        kept = [f"{line.decode()}\n" for line in old if line and json.loads(line)["stage"] != stage]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise UserError(
            f"{store.url(path)}: expected JSON objects with a stage, one a line, found something else ({err}); delete the file"
        ) from err
    if old or lines:
        store.write_bytes(path, "".join([*kept, *lines]).encode())
