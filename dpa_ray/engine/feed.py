"""Batches from a process of their own: what Ray Data does in the background must not hold up training.

Ray Data's executor is a thread that hardly rests. In the training process it fights for the interpreter's lock with
every small operation of the model (measured on the embedded default: steps five times as long).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpa_ray.batch import Batch
from dpa_ray.data import wire
from dpa_ray.data.ingest import Loader, MicroBatches, stream
from dpa_ray.errors import UserError

Packed = tuple[bytes, bytes | str, str]
"""A batch on its way (see data/wire.py), or two empty parts and what to tell the user."""


class Feeder:
    """The actor that streams for one training worker, stage after stage."""

    def __init__(self) -> None:
        self.batches: Iterator[Batch] = iter(())

    def start(self, loader: Loader, micro_batches: MicroBatches, prefetch: int, workers: int) -> None:
        """Drop what was streamed before, and begin."""
        self.batches = stream(loader, micro_batches, prefetch=prefetch, workers=workers)

    def next(self) -> Packed:
        """The next batch."""
        try:
            return (*wire.dumps(next(self.batches)), "")
        except UserError as err:  # as a value: an exception would come back as a traceback
            return b"", "", str(err)


class Feed:
    """A worker's side of its Feeder."""

    def __init__(self) -> None:
        """Start the actor beside this worker; it needs some seconds, during which a model can be loaded."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.actor: Any = ray.remote(num_cpus=0)(Feeder).options(scheduling_strategy=here).remote()

    def batches(self, loader: Loader, micro_batches: MicroBatches, *, prefetch: int, workers: int) -> Iterator[Batch]:
        """The batches of `micro_batches` in order; `prefetch` of them are asked for ahead, the first ones at once.

        Data tasks start while the caller goes on, to make its engine, say. Iterating raises: UserError with what a data
        task said.
        """
        self.actor.start.remote(loader, micro_batches, prefetch, workers)
        num = len(micro_batches)
        asked = deque(self.actor.next.remote() for _ in range(min(prefetch, num)))
        return self._taken(asked, num)

    def _taken(self, asked: deque[Any], num: int) -> Iterator[Batch]:
        """The batches asked for, as each is taken asking for another, `num` in all."""
        left = num - len(asked)
        while asked:
            tensors, rest, error = ray.get(asked.popleft())
            if error:
                raise UserError(error)
            if left:
                asked.append(self.actor.next.remote())
                left -= 1
            yield wire.loads(tensors, rest)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self.actor)
