"""The one training loop: every stage, every method, any engine. Knows neither Ray nor DeepSpeed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import Cursor, num_passes, shares
from dpa_ray.engine.nonfinite import Failed, Finding, What, find
from dpa_ray.engine.postmortem import describe
from dpa_ray.engine.protocol import Engine, all_sum, rank
from dpa_ray.errors import UserError
from dpa_ray.model.gain import auc
from dpa_ray.model.step import StepSums
from dpa_ray.stages.spec import learning_rate

HISTOGRAM_EVERY = 25
"""Steps between histograms of p - q in the metrics."""

Pass = tuple[np.ndarray, int]
"""One micro-batch of one rank: the rows of its samples (none: filler), and a row to make filler of."""


class Saver(Protocol):
    """Saves the state between steps; what the ranks must agree on for it is summed with what they count anyway."""

    def votes(self) -> Sequence[float]:
        """This rank's."""

    def before_telling(self) -> None:
        """A step is made; nobody was told of it yet."""

    def after(self, step: int, votes: Sequence[float]) -> None:
        """`step` (from 1) is done; `votes` are the sums over the ranks."""


@dataclass(frozen=True)
class Schedule:
    """How long a stage is and which learning rate each of its steps has."""

    num_steps: int
    peak_lr: float
    warmup_fraction: float

    def lr(self, step: int) -> float:
        """Of `step`, counted from 1."""
        return learning_rate(step - 1, self.num_steps, self.peak_lr, self.warmup_fraction)


@dataclass(frozen=True)
class Plan:
    """What one rank passes through the model in each step of a stage: computed as it is asked for, not kept.

    Every rank makes equally many passes of a step. Picklable, so that it can be followed where batches are made. A stage
    that goes on after `steps_done` steps is the same plan without them.
    """

    cursor: Cursor
    num_steps: int
    rank: int
    world_size: int
    micro_batch_size: int
    steps_done: int = 0

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(step from 1, epoch from 0, step within the epoch from 0) of each optimizer step."""
        for step in range(self.steps_done, self.num_steps):
            epoch, inside = divmod(step, self.cursor.steps_per_epoch)
            yield step + 1, epoch, inside

    def num_passes(self, step: int) -> int:
        """Of `step`, counted from 1."""
        num_rows = self.cursor.num_rows((step - 1) % self.cursor.steps_per_epoch)
        return num_passes(num_rows, self.world_size, self.micro_batch_size)

    @property
    def most_passes(self) -> int:
        """Of any step: the first is never shorter than another."""
        return self.num_passes(1)

    def __len__(self) -> int:
        """Passes of all steps that are left."""
        return sum(self.num_passes(step) for step, _, _ in self.steps())

    def __iter__(self) -> Iterator[Pass]:
        for _, epoch, inside in self.steps():
            rows = self.cursor.rows(epoch, inside)
            for share in shares(rows, self.world_size, self.micro_batch_size)[self.rank]:
                yield share, int(rows[0])


def train(
    engine: Engine,
    batches: Iterator[Batch],
    plan: Plan,
    schedule: Schedule,
    *,
    stage: str,
    seed: int,
    device: torch.device,
    record: Callable[[dict[str, Any], list[Batch]], None],
    saver: Saver | None = None,
    evaluate: Callable[[int], dict[str, Any]] = lambda step: {},
    explain: Callable[[Finding], str] = describe,
) -> None:
    """Run the steps of `plan`.

    The loss of a step is sum(w * nll) / sum(w) over all its micro-batches on all ranks. As the weights are known only
    after each forward, gradients are those of the sums, and are divided by sum(w) at the update.

    Args:
        batches: this rank's micro-batches, in the order of `plan`.
        seed: what dropout draws in a step follows from it, the stage, the step and the rank, so that nothing of it has to
            be saved.
        record: called on every rank with the step's metrics and this rank's batches.
        saver: is asked for its votes in each step, and told after it what all ranks voted.
        evaluate: further metrics after a step, by its number; called on all ranks, and outside of the step's time.
        explain: what to tell the user of a step whose loss or gradient is not finite; called on all ranks.
    Raises: UserError with that, where a loss or gradient is not finite; nothing was updated in that step.
    """
    engine.module.train()
    for step, epoch, _ in plan.steps():
        start = time.perf_counter()
        mine = [next(batches) for _ in range(plan.num_passes(step))]
        waited = time.perf_counter() - start
        num_slots = sum(map(engine.module.num_slots, mine))
        votes = saver.votes() if saver else []
        counts = all_sum(torch.tensor([*_counts(mine), num_slots, *votes], dtype=torch.float64, device=device)).tolist()
        num_samples, num_tokens, num_targets, num_untaught, num_skipped, num_slots = (int(x) for x in counts[:6])
        _draw_from(seed, stage, step)

        total = torch.zeros(StepSums.size(), dtype=torch.float64, device=device)
        weight_sum, each = math.nan, []
        for index, batch in enumerate(mine):
            sums = engine.forward(batch)
            each.append(sums.detached())
            total += each[-1]
            last = index == len(mine) - 1
            if last:
                total = all_sum(total)
                weight_sum = float(total[StepSums.names().index("weight")])
            # Divided by the targets, a number known beforehand, so that no sum grows with the batch; a step without
            # weight must change nothing, and an update with gradients that are not finite does not.
            loss = sums.loss / max(1, num_targets)
            engine.backward(loss * math.nan if last and weight_sum == 0 else loss, last=last)
        lr = schedule.lr(step)
        failed = partial(_failed, engine, explain, stage, step, lr, num_targets, mine, each)
        if not total.isfinite().all():
            raise failed("loss")
        norm = engine.update(weight_sum / max(1, num_targets) if weight_sum else 1.0, lr)
        if weight_sum and not math.isfinite(norm):
            raise failed("gradient")
        seconds = time.perf_counter() - start
        if saver:
            saver.before_telling()
        evaluated = evaluate(step)
        record(
            {
                "stage": stage, "step": step, "epoch": epoch, "num_samples": num_samples, "num_tokens": num_tokens,
                "num_targets": num_targets, "num_untaught": num_untaught, "num_skipped": num_skipped,
                **ratios(StepSums.of_detached(total.cpu()), num_targets, step), "lr": lr,
                "grad_norm": norm if weight_sum else 0.0, "updated": bool(weight_sum), "step_time_s": seconds,
                "data_wait_s": waited, "tokens_per_s": num_tokens / seconds,
                "packing_efficiency": num_tokens / max(1, num_slots), **evaluated,
            },
            mine,
        )  # fmt: skip
        if saver:
            saver.after(step, counts[6:])


def _draw_from(seed: int, stage: str, step: int) -> None:
    """Seed torch's generators, on all devices."""
    digest = hashlib.sha256(f"{seed} {stage} {step} {rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def ratios(sums: StepSums, num_targets: int, step: int) -> dict[str, Any]:
    """The step's means from its sums; 0 where there is nothing to take a mean of."""
    weight, nll, count = float(sums.weight), float(sums.nll), max(1, num_targets)
    means: dict[str, Any] = {
        "loss": float(sums.loss) / weight if weight else 0.0,
        "nll_mean": nll / count,
        "weight_mean": weight / count,
        "weight_at_lower_fraction": float(sums.at_lower) / count,
        "weight_at_upper_fraction": float(sums.at_upper) / count,
    }
    grounded, others = float(sums.num_grounded), num_targets - float(sums.num_grounded)
    if grounded:  # known on builtin:shapes only
        means["nll_mean_visual"] = float(sums.grounded_nll) / grounded
        means["weight_mean_visual"] = float(sums.grounded_weight) / grounded
        if others > 0:
            means["nll_mean_style"] = (nll - float(sums.grounded_nll)) / others
            means["weight_mean_style"] = (weight - float(sums.grounded_weight)) / others
    gains = sums.gains.numpy()
    if (area := auc(gains)) is not None:
        means["gain_auc"] = area
    if gains.any() and step % HISTOGRAM_EVERY == 1:
        means["gain_histogram"] = gains.sum(0).astype(int).tolist()
    return means


def _counts(batches: list[Batch]) -> list[int]:
    sums = [sum(getattr(b, name) for b in batches) for name in ("num_samples", "num_tokens", "num_targets")]
    return [*sums, sum(len(b.untaught) for b in batches), sum(b.num_skipped for b in batches)]


def _failed(
    engine: Engine,
    explain: Callable[[Finding], str],
    stage: str,
    step: int,
    lr: float,
    num_targets: int,
    batches: list[Batch],
    sums: list[Tensor],
    what: What,
) -> UserError:
    """What to raise where the step's `what` is not finite. All ranks call it."""
    finite = [bool(own.isfinite().all()) for own in sums]
    return UserError(explain(find(engine, Failed(what, stage, step, lr, num_targets, batches, finite))))
