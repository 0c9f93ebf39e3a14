"""What does a run cost its driver and head, and at how many GPUs would one of them be the limit?

Costs of single calls were measured with this package's own actors (measure.py; `--measure` does it on the machine at hand).
Work that grows with the number of workers meets a process that does not grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpa_ray.engine.pulse import BEATS, MOST_BETWEEN_S

POLL_S = 1.0
"""The controller's round over all workers should not take longer: a lost one is seen so much later."""

MAX_WORKERS = 1 << 24


@dataclass(frozen=True)
class Costs:
    """Seconds of one process for one call. `origin` says where they were measured."""

    board_call_s: float  # the driver's Board, for one event or sign of life
    poll_s: float  # the controller, for one worker in a round
    gcs_task_s: float  # the head's GCS, for one task that ran anywhere
    origin: str


@dataclass(frozen=True)
class Load:
    """What one worker (or, where `per_run`, the whole run) asks for, per second."""

    steps_per_s: float  # of the run
    tasks_per_worker_s: float
    collective_timeout_s: float
    checkpoint_every_s: float
    store_latency_s: float


@dataclass(frozen=True)
class Limit:
    """A process that does not grow with the cluster. `share` of 1: it can do no more (or no longer in time)."""

    who: str
    what: str
    share: float  # at the number of workers that was asked for
    at_workers: int | None  # None: none up to MAX_WORKERS


def limits(load_at: Callable[[int], Load], costs: Costs, num_workers: int) -> list[Limit]:
    """Of each such process; `load_at` gives the load of so many workers."""

    def board(n: int) -> float:
        load = load_at(n)
        beats = n / min(load.collective_timeout_s / BEATS, MOST_BETWEEN_S)
        return costs.board_call_s * (beats + load.steps_per_s)

    def poll(n: int) -> float:
        return costs.poll_s * n / POLL_S

    def gcs(n: int) -> float:
        return costs.gcs_task_s * n * load_at(n).tasks_per_worker_s

    def notes(n: int) -> float:
        load = load_at(n)
        return n * load.store_latency_s / load.checkpoint_every_s

    shares = {
        ("driver", "events and signs of life on its board"): board,
        ("controller", f"a round over all workers within {POLL_S:g} s"): poll,
        ("head", "task events in the GCS"): gcs,
        ("rank 0", "one note of each rank read before the next checkpoint"): notes,
    }
    return [Limit(who, what, share(num_workers), _first(share)) for (who, what), share in shares.items()]


def _first(share: Callable[[int], float]) -> int | None:
    """The fewest workers with which `share`, which grows with them, is 1."""
    high = 1
    while share(high) < 1:
        high *= 2
        if high > MAX_WORKERS:
            return None
    low = high // 2  # too few, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) >= 1 else (middle, high)
    return high
