"""What becomes of a run whose worker fails: it goes on from its last checkpoint, ends with the user's error, or gives up.

Lives in Ray Train's controller, which would otherwise start the workers again whatever they died of. Imports little, for
that process's sake.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import UserCallback

from dpa_ray.errors import LeaseTaken, NoAnswer, UserError

FAILED, STARTED = "failed", "workers_started"
"""The events that workers are gone and others are to come, and that they are there."""

INNER = ("cause", "_base_exc", "health_check_failure", "controller_failure", "__cause__")
"""Where Ray's exceptions keep those that they wrap."""


class Failures(UserCallback):
    """Told of every failure of workers. What it raises ends the run."""

    def __init__(self, board: Any, max_failures: int):
        """`max_failures`: how many the run gets over, one after the other without a new checkpoint in between."""
        self.board, self.max_failures = board, max_failures
        self.progress, self.failures = 0, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises: UserError that a worker raised, or where workers were lost too often; RuntimeError where it was an error."""
        del run_context
        causes = {rank: root_causes(err) for rank, err in worker_exceptions.items()}
        for found in causes.values():
            for cause in found:
                if isinstance(cause, UserError) and not isinstance(cause, NoAnswer):
                    raise for_user(cause)
        what = describe(causes)
        progress = ray.get(self.board.num_progress.remote())
        if progress > self.progress:
            self.progress, self.failures = progress, 0
        if any(isinstance(c, RayActorError) and c.preempted for found in causes.values() for c in found):
            self._go_on(f"a node was taken away ({what}); going on with what is left")
            return
        self.failures += 1
        if self.failures > self.max_failures:
            times = f", for the {self.failures}th time without a new checkpoint" if self.failures > 1 else ""
            lost = any(isinstance(c, RayActorError) for found in causes.values() for c in found)
            raise (UserError if lost else RuntimeError)(
                f"{what}{times} (cluster.max_failures: {self.max_failures}); what was saved stays, and the same command "
                "goes on from there"
            )
        self._go_on(f"{what}; going on from the last checkpoint (failure {self.failures} of {self.max_failures})")

    def _go_on(self, text: str) -> None:
        self.board.put.remote("note", {"text": text})
        self.board.put.remote(FAILED, {})


def for_user(cause: UserError) -> UserError:
    """The same out of Ray's wrapping; a lease that is taken stays one, as it can be waited for."""
    return LeaseTaken(str(cause)) if isinstance(cause, LeaseTaken) else UserError(str(cause))


def describe(causes: dict[int, list[BaseException]]) -> str:
    """One line on what workers died of; of several, on those that were killed, for their neighbours fail with them."""
    killed = {rank: c for rank, found in causes.items() for c in found if isinstance(c, RayActorError)}
    if killed:
        ranks = ", ".join(map(str, killed))
        return f"worker {ranks} was lost: {first_line(next(iter(killed.values())))}"
    rank, found = next(iter(causes.items()))
    return f"worker {rank} failed: {type(found[-1]).__name__}: {first_line(found[-1])}"


def root_causes(err: BaseException) -> list[BaseException]:
    """`err` and what it wraps, outermost first."""
    causes: list[BaseException] = []
    pending: list[Any] = [err]
    while pending:
        cause = pending.pop(0)
        if not isinstance(cause, BaseException) or cause in causes:
            continue
        causes.append(cause)
        pending += [getattr(cause, name, None) for name in INNER]
    return causes


def first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
