"""Batches from a process of their own: asking for them ahead must neither wait for training nor hold it up.

Measured when Ray Data made them, whose executor is a thread that hardly rests: in the training process it fought for the
interpreter's lock with every small operation of the model (on the embedded default, steps took five times as long).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpa_ray.batch import Batch
from dpa_ray.data import wire
from dpa_ray.data.ingest import DEATH_HINT, TASK_CPUS, Loader, MicroBatch, MicroBatches, packed_stream
from dpa_ray.data.retry import first_line
from dpa_ray.errors import UserError

MAX_RESTARTS = 3
"""How often a Feeder that died is replaced before a batch comes: what kills it each time will not stop by itself."""

NOTICE_S = 30.0
"""How long training waits for a batch before people are told."""

_log = logging.getLogger(__name__)

Answer = tuple[wire.Packed | None, str]
"""A batch on its way, or what to tell the user."""


@dataclass(frozen=True)
class _From:
    """Micro-batches without the first `num_taken`, which nobody loads a second time."""

    all: MicroBatches
    num_taken: int

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(self.all, self.num_taken, None)


class Feeder:
    """The actor that streams for one training worker, stage after stage."""

    def __init__(self) -> None:
        self.batches: Iterator[wire.Packed] = iter(())

    def start(self, loader: Loader, micro_batches: _From, prefetch: int, workers: int) -> None:
        """Drop what was streamed before, and begin."""
        self.batches = packed_stream(loader, micro_batches, prefetch=prefetch, workers=workers)

    def next(self) -> Answer:
        """The next batch."""
        try:
            return next(self.batches), ""
        except UserError as err:  # as a value: an exception would come back as a traceback
            return None, str(err)


class Feed:
    """A worker's side of its Feeder."""

    def __init__(self) -> None:
        """Start the actor beside this worker; it needs some seconds, during which a model can be loaded."""
        self.actor = _actor()

    def batches(
        self,
        loader: Loader,
        micro_batches: MicroBatches,
        *,
        prefetch: int,
        workers: int,
        stall_timeout_s: float = math.inf,
        note: Callable[[str], None] = _log.warning,
    ) -> Iterator[Batch]:
        """The batches of `micro_batches` in order; `prefetch` of them are asked for ahead, the first ones at once.

        Data tasks start while the caller goes on, to make its engine, say. A Feeder that dies is replaced, and goes on
        where it was; `note` is told of that, and of a batch that is long in coming. Iterating raises: UserError with
        what a data task said, where Feeders die one after the other, or where one batch does not come for
        `stall_timeout_s`.
        """

        def ask(num_taken: int) -> deque[Any]:
            self.actor.start.remote(loader, _From(micro_batches, num_taken), prefetch, workers)
            return deque(self.actor.next.remote() for _ in range(min(prefetch, num - num_taken)))

        num = len(micro_batches)
        asked = ask(0)

        def taken() -> Iterator[Batch]:
            """As each batch is taken another is asked for."""
            nonlocal asked
            num_taken = num_restarts = 0
            while num_taken < num:
                try:
                    packed, error = _awaited(asked[0], f"batch {num_taken + 1:,} of {num:,}", stall_timeout_s, note)
                except RayActorError as err:
                    if num_restarts == MAX_RESTARTS:
                        raise UserError(
                            f"the process that feeds this worker died {num_restarts + 1} times before batch "
                            f"{num_taken + 1:,} of {num:,} came ({first_line(err)}); {DEATH_HINT}"
                        ) from None
                    num_restarts += 1
                    note(f"the process that feeds this worker died at batch {num_taken + 1:,}; starting another")
                    self.close()
                    self.actor = _actor()
                    asked = ask(num_taken)
                    continue
                if error:
                    raise UserError(error)
                asked.popleft()
                num_taken, num_restarts = num_taken + 1, 0
                if num_taken + len(asked) < num:
                    asked.append(self.actor.next.remote())
                assert packed is not None, "a batch or an error"
                yield wire.loads(packed)

        return taken()

    def close(self) -> None:
        """End the actor."""
        ray.kill(self.actor)


def _awaited(answer: Any, what: str, stall_timeout_s: float, note: Callable[[str], None]) -> Answer:
    """`answer`, when it comes. Raises: UserError after `stall_timeout_s`; RayActorError where the Feeder died."""
    begun = time.monotonic()
    try:
        made: Answer = ray.get(answer, timeout=min(NOTICE_S, stall_timeout_s))
        return made
    except GetTimeoutError:
        if stall_timeout_s > NOTICE_S:
            note(
                f"waiting for data: {what} has not come for {NOTICE_S:g} s (data.stall_timeout_s: {stall_timeout_s:g})"
            )
    left_s = begun + stall_timeout_s - time.monotonic()
    try:
        made = ray.get(answer, timeout=None if math.isinf(left_s) else max(0.0, left_s))
    except GetTimeoutError:
        raise UserError(_stalled(what, stall_timeout_s)) from None
    note(f"{what} came after {time.monotonic() - begun:.0f} s")
    return made


def _stalled(what: str, stall_timeout_s: float) -> str:
    """What was waited for, and what there is to make it with."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"no batch for {stall_timeout_s:g} s (data.stall_timeout_s): waiting for {what} from tasks that "
        f"ask for {TASK_CPUS:g} CPU each; the cluster has {there.get('CPU', 0):g} CPU, {free.get('CPU', 0):g} free. Give it more "
        "CPUs for data, see whether the store answers, or set data.stall_timeout_s higher. What was saved stays, and the same "
        "command goes on from there"
    )


def _actor() -> Any:
    """A Feeder on the caller's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Feeder).options(scheduling_strategy=here).remote()
