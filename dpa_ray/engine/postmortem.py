"""What is kept and told of a step whose loss or gradient is not finite? The guilty micro-batch, and how to go on.

runs/<name>/failures/<stage>-step-<n>/failure.json        what it was, the step's samples, the last metrics
runs/<name>/failures/<stage>-step-<n>/batch.safetensors   the micro-batch's tensors, as they came from the data
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.data import wire
from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.retry import bridging
from dpa_ray.data.skip import entry_of
from dpa_ray.engine.nonfinite import Finding, StepSample
from dpa_ray.engine.protocol import gathered, rank, world_size
from dpa_ray.stages.spec import TrainTask
from dpa_ray.store.fs import Store

RECORD, BATCH = "failure.json", "batch.safetensors"

LAST_STEPS = 20
"""Of the metrics before the step, in the record."""

SHOWN = 20
"""Samples in a message; the record has all."""


class Postmortem:
    """Keeps what is needed to look into a failed step, and says how to go on."""

    def __init__(self, store: Store, task: TrainTask, lines: Sequence[str]):
        """`lines`: the stage's metrics so far, a JSON text each; on rank 0."""
        self.store, self.task, self.lines = store, task, lines

    def __call__(self, finding: Finding) -> str:
        """The message. All ranks call it, and get the same."""
        failed = finding.failed
        folder = f"{self.task.run_path}/failures/{failed.stage}-step-{failed.step}"
        error = self._keep(finding, folder)
        kept = f"Kept for a look: {self.store.url(folder)}"
        if error is not None:
            kept = f"Nothing could be kept of it for a look ({error})"
        return describe(
            finding, kept=kept, before=self.task.recipe.data.skip_ids, name=self.task.run_path.removeprefix("runs/")
        )

    def _keep(self, finding: Finding, folder: str) -> str | None:
        """Write the dump; what went wrong with that, if anything, on every rank."""
        with bridging(self.task.recipe.data.retry_s):
            store, batch = BridgedStore(self.store), None
            if finding.batch is not None and finding.batch[0] == rank():
                batch = finding.failed.batches[finding.batch[1]]
            tensors, rest = wire.dumps(_arrays(batch)) if batch is not None else (None, None)
            every = gathered(
                (rest, _attempt(lambda: store.write_bytes(f"{folder}/{BATCH}", tensors)) if tensors else None)
            )
            error = next((err for _, err in every if err is not None), None)
            if rank() == 0 and error is None:
                rest = next((theirs for theirs, _ in every if theirs is not None), None)
                error = _attempt(lambda: store.write_json(f"{folder}/{RECORD}", self._record(finding, rest)))
            return next((err for err in gathered(error) if err is not None), None)

    def _record(self, finding: Finding, batch: str | None) -> dict[str, Any]:
        failed, task = finding.failed, self.task
        kept = None
        if batch is not None and finding.batch is not None:
            kept = {
                "file": BATCH,
                "rank": finding.batch[0],
                "micro_batch": finding.batch[1],
                "fields": json.loads(batch),
            }
        return {
            "what": failed.what, "stage": failed.stage, "step": failed.step, "num_steps": task.num_steps, "lr": failed.lr,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "key": task.result.key, "data": task.data.digest, "world_size": world_size(),
            "micro_batch_size": getattr(task.recipe.stages, task.stage).micro_batch_size,
            "precision": task.recipe.precision,
            "skip_ids": proposed(finding, task.recipe.data.skip_ids),
            "searched": finding.searched, "search_error": finding.error,
            "samples": [
                {"rank": s.rank, "micro_batch": s.number, "row": s.row, "id": s.id, "place": s.place,
                 "has_targets": s.has_targets, "finite": s.finite, "loss": s.loss}
                for s in finding.samples
            ],
            "not_finite": [{"rank": r, "micro_batch": n} for r, n in finding.batches],
            "batch": kept,
            "metrics": [_plain(json.loads(line)) for line in self.lines[-LAST_STEPS:]],
        }  # fmt: skip


def _plain(value: Any) -> Any:
    """NaN and infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arrays(batch: Batch) -> dict[str, Any]:
    return {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in vars(batch).items()}


def _attempt(write: Callable[[], None]) -> str | None:
    """What went wrong, if anything: the store's trouble must not hide the step's."""
    try:
        write()
    except Exception as err:
        return str(err) or type(err).__name__
    return None


def proposed(finding: Finding, before: Sequence[str] = ()) -> list[str]:
    """`data.skip_ids` to go on with: what it has already, and the guilty samples."""
    new = [entry_of(s.digest, s.row) for s in finding.guilty] if not finding.all_guilty else []
    return [*before, *(entry for entry in new if entry not in before)]


def describe(finding: Finding, *, kept: str = "", before: Sequence[str] = (), name: str = "NAME") -> str:
    """What happened, which samples it comes from, where it is kept, and what to do."""
    failed = finding.failed
    rates = f"stages.{failed.stage}.lr (at this step: {failed.lr:.3g})"
    parts = [
        f"stage {failed.stage}, step {failed.step}: the {failed.what} is not finite; this step changed nothing.",
        _whose(finding),
    ]
    if kept:
        parts.append(f"{kept}.")
    if finding.guilty and not finding.all_guilty:
        entries = json.dumps(proposed(finding, before))
        again = "this stage and what comes of it begin anew"
        if failed.stage == "proxy_mllm":
            again = "all that learns from data.pretrain begins anew (a proxy and its q too)"
        parts.append(
            f"To go on without {'it' if len(finding.guilty) == 1 else 'them'}, run the same command with 'data.skip_ids="
            f"{entries}' --name {name}: {again}, as they then learn from other samples; the others are reused. "
            f"Or lower {rates}."
        )
    else:
        parts.append(
            f"Lower {rates}, or lengthen the warm-up (stages.{failed.stage}.warmup_fraction), under another --name: it is "
            "another recipe then, which reuses the finished stages."
        )
    return " ".join(parts)


def _whose(finding: Finding) -> str:
    failed, num = finding.failed, len(finding.samples)
    if finding.all_guilty:
        why = f"Each of its {num} samples gives that alone: it comes from the parameters, not from a sample"
    elif finding.guilty:
        why = f"Of its {num} samples, these give that alone: {_named(finding.guilty)}"
        return f"{why}."
    elif not finding.searched:
        why = "Which sample it comes from cannot be told where ZeRO-3 shares out the parameters"
    elif finding.error is not None:
        why = f"Which sample it comes from could not be found out ({finding.error})"
    else:
        why = f"None of its {num} samples gives that alone: it is the {failed.what} of the whole step"
    return f"{why}. Its samples: {_named(finding.samples)}."


def _named(samples: Sequence[StepSample]) -> str:
    names = [
        f"{s.id if s.id is not None else 'no id'} (row {s.row}{f', {s.place}' if s.place else ''})"
        for s in samples[:SHOWN]
    ]
    more = f", and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return ", ".join(names) + more
