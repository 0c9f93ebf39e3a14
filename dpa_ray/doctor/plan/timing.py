"""How long is a step on so many workers, from one on others or from FLOPs?"""

from __future__ import annotations

from dataclasses import dataclass

from dpa_ray.doctor.plan.options import Given, PlanOptions
from dpa_ray.doctor.plan.work import Work, exchanged_bytes
from dpa_ray.errors import UserError


@dataclass(frozen=True)
class Speed:
    """Of one stage on one worker: seconds that a sample takes it, and where that comes from."""

    sample_s: float
    origin: str  # in words


@dataclass(frozen=True)
class Layout:
    """How a recipe's stage is laid out."""

    zero_stage: int | None
    item: int
    micro_batch_size: int
    gpus_per_worker: float  # 0: CPUs, where each worker is counted as one

    def num_workers(self, num_gpus: int) -> int:
        return max(1, int(num_gpus / (self.gpus_per_worker or 1)))


def load(batch: int, num_workers: int) -> int:
    """Samples of a step on the worker that has most."""
    return max(1, -(-batch // num_workers))


def exchange_s(work: Work, layout: Layout, batch: int, num_workers: int, options: PlanOptions) -> float:
    """The network's part of a step, none of it hidden behind computing; inside one node nothing is counted."""
    gpus = num_workers * (layout.gpus_per_worker or 1)
    if gpus <= options.gpus_per_node:
        return 0.0
    passes = -(-load(batch, num_workers) // layout.micro_batch_size)
    sent = exchanged_bytes(
        work, zero_stage=layout.zero_stage, item=layout.item, num_workers=num_workers, num_passes=passes
    )
    return sent / (options.network_bytes_per_s * (layout.gpus_per_worker or 1))


def step_s(work: Work, layout: Layout, speed: Speed, batch: int, num_workers: int, options: PlanOptions) -> float:
    """A step of `batch` samples. The worker with most of them decides."""
    return load(batch, num_workers) * speed.sample_s + exchange_s(work, layout, batch, num_workers, options)


def from_measured(work: Work, layout: Layout, given: Given, batch: int, options: PlanOptions, origin: str) -> Speed:
    """From a step of `batch` samples that took `given`. Raises: UserError where the network's part alone is longer."""
    workers = layout.num_workers(given.num_gpus)
    network = exchange_s(work, layout, batch, workers, options)
    if network >= given.time_s:
        raise UserError(
            f"{work.stage}: expected a step of more than {network:.3g} s on {given.num_gpus} GPUs, which the exchange of gradients "
            f"alone takes at --network-gbyte-s {options.network_bytes_per_s / 1e9:g}, found {given.time_s:g} s; give a faster network"
        )
    return Speed((given.time_s - network) / load(batch, workers), origin)


def from_flops(work: Work, layout: Layout, options: PlanOptions) -> Speed:
    """From the model's FLOPs, the GPU's peak and the share of it that is reached."""
    gpus = layout.gpus_per_worker or 1
    rate = options.peak_flops * options.mfu * gpus
    origin = f"{work.flops_per_sample / 1e12:,.2f} TFLOPs a sample at {options.mfu:.0%} of {options.peak_flops / 1e12:,.0f} TFLOP/s"
    return Speed(work.flops_per_sample / rate, origin)


def blind_s(work: Work, speed: Speed, num_workers: int) -> float:
    """The job that writes q beforehand: as many FLOPs a second as the stage itself reaches. 0 where there is none."""
    if work.blind != "cached":
        return 0.0
    once = min(work.num_taken, work.num_samples)
    return once * speed.sample_s * work.blind_flops_per_sample / work.flops_per_sample / num_workers
