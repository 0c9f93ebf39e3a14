"""How does a global batch go on the workers: how many passes of how many samples, and how much of that is filler?"""

from __future__ import annotations

from dataclasses import dataclass

from dpa_ray.data.cursor import num_passes
from dpa_ray.recipe import Recipe


@dataclass(frozen=True)
class BatchLayout:
    """A stage's optimizer steps on so many workers. Counts are of a whole step unless they say otherwise."""

    stage: str
    num_workers: int
    global_batch_size: int
    micro_batch_size: int
    num_samples: int  # of the first step: the global batch, or all of less data
    num_passes: int  # micro-batches of each worker: the accumulation steps
    num_filler_passes: int  # of all workers together; made of filler alone, they only keep the ranks in step
    steps_per_epoch: int | None = None  # None: not known how much data there is
    num_steps: int | None = None  # of the stage
    last_batch_size: int | None = None  # of an epoch's last step

    @property
    def num_idle_workers(self) -> int:
        """Workers that are given no sample in any step."""
        return max(0, self.num_workers - self.num_samples)


def batch_layout(recipe: Recipe, stage: str, num_workers: int, num_samples: int | None = None) -> BatchLayout:
    """The layout of `stage` on `num_workers`; with `num_samples` of the data (an epoch's, after `fraction`), its steps."""
    section = getattr(recipe.stages, stage)
    size, micro = section.global_batch_size, section.micro_batch_size
    first = size if num_samples is None else min(size, num_samples)
    passes = num_passes(first, num_workers, micro)
    shares = [first // num_workers + (rank < first % num_workers) for rank in range(num_workers)]
    filler = sum(passes - -(-share // micro) for share in shares)
    steps_per_epoch = num_steps = last = None
    if num_samples is not None:
        steps_per_epoch = -(-num_samples // size)
        whole = section.epochs * steps_per_epoch
        num_steps = min(whole, section.max_steps or whole)
        last = num_samples - (steps_per_epoch - 1) * size
    return BatchLayout(stage, num_workers, size, micro, first, passes, filler, steps_per_epoch, num_steps, last)


def risks(layout: BatchLayout) -> list[str]:
    """What is wasted in every step, and which key changes it."""
    if not layout.num_idle_workers:
        return []
    if layout.num_samples < layout.global_batch_size:
        what, advice = f"{layout.num_samples} samples in all of its data", "Lower cluster.workers, or add data"
    else:
        what = f"{layout.num_samples} samples a step (stages.{layout.stage}.global_batch_size)"
        advice = "Raise it, or lower cluster.workers"
    return [
        f"{layout.stage}: {what} on {layout.num_workers} workers: expected at least one for each, found {layout.num_idle_workers} "
        f"workers that get none and compute filler in every step. {advice}"
    ]
