"""A loss or gradient is not finite: which samples of the step does it come from?

Each sample of the micro-batches in question goes through the model once more, alone, so that no sample answers for
another that shared a row with it. Where parameters are shared out, all ranks make equally many passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dpa_ray.batch import Batch
from dpa_ray.engine.protocol import Engine, gathered, rank
from dpa_ray.model.packed import alone

What = Literal["loss", "gradient"]


@dataclass(frozen=True)
class Failed:
    """A step that was stopped before its update, as one rank knows it."""

    what: What
    stage: str
    step: int
    lr: float
    num_targets: int  # of the step, over all ranks
    batches: Sequence[Batch]  # this rank's micro-batches
    finite: Sequence[bool]  # the sums of each of them


@dataclass(frozen=True)
class StepSample:
    """One sample of the step."""

    rank: int
    number: int  # of the micro-batch, on its rank
    digest: str
    row: int
    id: str | None
    place: str | None
    has_targets: bool
    finite: bool | None = None  # alone; None: it was not tried
    loss: float | None = None  # alone, weighted mean over its targets, where that is finite


@dataclass(frozen=True)
class Finding:
    """What all ranks know of a step that was stopped."""

    failed: Failed
    samples: list[StepSample]  # of all ranks
    batches: list[tuple[int, int]]  # (rank, number) of each micro-batch whose sums are not finite
    searched: bool  # false: which sample it is could not be looked for
    error: str | None = None  # of the search

    @property
    def guilty(self) -> list[StepSample]:
        """The samples whose number is not finite when they are alone."""
        return [sample for sample in self.samples if sample.finite is False]

    @property
    def all_guilty(self) -> bool:
        """Every sample, of several: then it lies in the parameters."""
        taught = [sample for sample in self.samples if sample.has_targets]
        return len(taught) > 1 and len(self.guilty) >= len(taught)

    @property
    def batch(self) -> tuple[int, int] | None:
        """(rank, number) of the micro-batch to look at."""
        if self.guilty:
            return self.guilty[0].rank, self.guilty[0].number
        return self.batches[0] if self.batches else None


def find(engine: Engine, failed: Failed) -> Finding:
    """Look for the samples. All ranks call it, and all know the same after it."""
    searched = failed.what == "loss" or not engine.sharded
    samples = [_of(number, batch, i) for number, batch in enumerate(failed.batches) for i in range(len(batch.rows))]
    places = [(number, i) for number, batch in enumerate(failed.batches) for i in range(len(batch.rows))]
    suspects = [
        at
        for at, (number, _) in enumerate(places)
        if samples[at].has_targets and (failed.what == "gradient" or not failed.finite[number])
    ]
    num_passes = max(gathered(len(suspects))) if engine.sharded else len(suspects)
    error = None
    was_training = engine.module.training
    engine.module.eval()  # what dropout draws alone is not what it drew
    try:
        for turn in range(num_passes if searched else 0):
            # a rank with fewer suspects passes something through beside the others
            at = suspects[turn] if turn < len(suspects) else None
            number, i = places[at] if at is not None else (0, 0)
            found = _try(engine, failed, alone(failed.batches[number], i))
            if at is not None:
                samples[at] = replace(samples[at], **found)
    except Exception as err:  # whatever it is: it must not hide what stopped the step
        if engine.sharded:  # the others are in a forward that this rank has left
            raise
        error = f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"
    engine.module.train(was_training)
    wrong = [(rank(), number) for number, finite in enumerate(failed.finite) if not finite]
    everyone: list[Any] = gathered((samples, wrong, error))
    return Finding(
        failed,
        [sample for theirs, _, _ in everyone for sample in theirs],
        [place for _, theirs, _ in everyone for place in theirs],
        searched,
        next((err for _, _, err in everyone if err is not None), None),
    )


def _of(number: int, batch: Batch, i: int) -> StepSample:
    digest, row = batch.rows[i]
    mine = alone(batch, i)
    return StepSample(
        rank(), number, digest, row, batch.ids[i], batch.places[i] if batch.places else None, mine.num_targets > 0
    )


def _try(engine: Engine, failed: Failed, sample: Batch) -> dict[str, Any]:
    """Is the number finite of one sample alone?"""
    if failed.what == "loss":
        with torch.no_grad():
            sums = engine.forward(sample)
        finite = bool(sums.detached().isfinite().all())
    else:
        sums = engine.module(sample.to(next(iter(engine.parameters)).device))
        # not by `backward`: an engine's own hooks would add to what it has accumulated
        grads = torch.autograd.grad(sums.loss / max(1, failed.num_targets), engine.parameters, allow_unused=True)
        finite = all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
    loss, weight = float(sums.loss.detach()), float(sums.weight)
    mean = loss / weight if weight else 0.0
    return {"finite": finite, "loss": mean if mean == mean and abs(mean) != float("inf") else None}
