"""What is the nll of a held-out set now? All ranks read their shares of it, at a stage's cadence or once at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import shares
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepared import Prepared
from dpa_ray.engine.protocol import all_sum, barrier, rank, world_size
from dpa_ray.eval.held_out import PREFIX, TIME, VISUAL_GAIN, HeldOutNll, held_out_nll
from dpa_ray.model.held_out import SUMS_SHAPE, nll_sums
from dpa_ray.model.step import StepModule
from dpa_ray.stages.spec import TrainTask


class HeldOut:
    """The first samples of a held-out set, shared among the ranks, who all make equally many passes of them."""

    def __init__(
        self, module: StepModule, loader: Loader, num_samples: int, batch_size: int, device: torch.device, *, keep: bool
    ):  # fmt: skip
        """`loader` reads the set, neither packed nor with a cached q; `keep` its batches in memory, to be read again."""
        self.module, self.loader, self.device, self.keep = module, loader, device, keep
        rows = np.arange(min(num_samples, loader.prepared.num_rows))
        self.passes = shares(rows, world_size(), batch_size)[rank()]
        self.kept: list[Batch] = []

    def nll(self) -> HeldOutNll:
        """Of the model as it is now, over all ranks; the same on each. All ranks call it.

        Nothing is drawn and nothing trained: the parameters, their gradients and the mode of the module stay. Raises:
        UserError where a sample cannot be read.
        """
        total = torch.zeros(SUMS_SHAPE, dtype=torch.float64, device=self.device)
        for batch in self._batches():
            total += nll_sums(self.module, batch.to(self.device), VISUAL_GAIN)
        barrier()  # reading may take one worker longer than a collective may
        return held_out_nll(all_sum(total).tolist())

    def _batches(self) -> Iterator[Batch]:
        if self.kept:
            yield from self.kept
            return
        read = []
        for rows in self.passes:
            batch = self.loader.load(rows, 0)
            if self.keep:
                read.append(batch)
            yield batch
        self.kept = read


def held_out_loader(loader: Loader, held_out: Prepared) -> Loader:
    """As `loader` reads a stage's samples, but not packed, without a cached q, and those of `held_out`."""
    return replace(loader, prepared=held_out, packing=False, blind=None, skipped=frozenset(), can_skip=False)


def while_running(
    task: TrainTask, module: StepModule, loader: Loader, device: torch.device
) -> Callable[[int], dict[str, Any]]:
    """What a stage's loop asks after each step: further keys of the step's metrics, none where it is not time.

    It is time every `eval.every_steps` steps and after the last, by the step's number alone: a stage that goes on from a
    checkpoint is evaluated after the same steps as one that was never stopped. `loader` is the stage's own.
    """
    section, size = task.recipe.eval, getattr(task.recipe.stages, task.stage).micro_batch_size
    if task.held_out is None or section.every_steps is None:
        return lambda step: {}
    loader = held_out_loader(loader, task.held_out)
    held_out = HeldOut(module, loader, section.running_samples, size, device, keep=True)
    return partial(_numbers, held_out, section.every_steps, task.num_steps)


def _numbers(held_out: HeldOut, every_steps: int, num_steps: int, step: int) -> dict[str, Any]:
    if step % every_steps and step != num_steps:
        return {}
    begun = time.perf_counter()
    found = {f"{PREFIX}{name}": value for name, value in asdict(held_out.nll()).items() if value is not None}
    return {**found, TIME: time.perf_counter() - begun}
