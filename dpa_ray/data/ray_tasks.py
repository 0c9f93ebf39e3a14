"""What do our Ray tasks have in common? A dead one is done again, but not for ever; Ray Data is quiet."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpa_ray.data.retry import first_line
from dpa_ray.errors import UserError

TASK_RETRIES = 8
"""How often a task is done again whose process or node died. Ray Data's own is for ever, Ray's 3: a sample that ends
its process must not hang the run, nor a node that goes away end it."""

RETRY_ENVIRONMENT = {"RAY_task_oom_retries": str(TASK_RETRIES)}
"""The same for tasks that Ray itself ends because a node's memory is nearly full. Ray reads it in the process that starts
the tasks, when it joins; in workers it must come from their environment."""


def quiet_ray_data(context: Any) -> None:
    """Ray Data without progress bars and logs of its own, and never giving up because its consumer takes long."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it also raises


class CpuNodesFirst:
    """Where the next data task goes: to the nodes without GPUs in turn, and to others while those are full.

    Where there are none beside nodes with GPUs, anywhere, spread. Nodes come and go: they are looked at now and then.
    """

    LOOK_EVERY_S = 60.0

    def __init__(self, task_cpus: float):
        self.task_cpus = task_cpus
        self._nodes: list[str] = []
        self._looked_at = -math.inf
        self._number = 0

    def next(self) -> Any:
        """Ray's scheduling strategy for one task."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        now = time.monotonic()
        if now - self._looked_at >= self.LOOK_EVERY_S:
            self._looked_at, self._nodes = now, self._look()
        if not self._nodes:
            return "SPREAD"
        self._number += 1
        node = self._nodes[self._number % len(self._nodes)]
        # without the last, a task would wait for a node that is full, and training for it
        return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)

    def _look(self) -> list[str]:
        """The nodes without GPUs and with CPUs enough, in an order of this process's own: not all begin with the same."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        if not any(node["Resources"].get("GPU") for node in alive):
            return []
        without = [n for n in alive if not n["Resources"].get("GPU") and n["Resources"].get("CPU", 0) >= self.task_cpus]
        found = [str(node["NodeID"]) for node in without]
        start = os.getpid() % len(found) if found else 0
        return found[start:] + found[:start]


@contextmanager
def bounded_retries() -> Iterator[dict[str, int]]:
    """Options for a map of Ray Data: a task's process may die TASK_RETRIES times."""
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to say it, and warns that 2.64 will need one
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        yield {"max_retries": TASK_RETRIES}


@contextmanager
def deaths_told(what: str, hint: str) -> Iterator[None]:
    """Raises: UserError where Ray gives up on processes that died in this block; `what` names them, `hint` says what helps.

    An exception that a task raised is let through: it has a traceback of its own.
    """
    from ray import exceptions

    try:
        yield
    except (
        exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError, exceptions.RayActorError, exceptions.ObjectLostError,
    ) as err:  # fmt: skip
        raise UserError(
            f"{what} died again and again ({type(err).__name__}: {first_line(err)}); memory that ran out is the usual "
            f"cause: {hint}. Ray's logs and the kernel's (dmesg) on that node say more"
        ) from None
