"""What becomes of a run whose worker fails: it goes on from its last checkpoint, ends with the user's error, or gives up.

Lives in Ray Train's controller, which would otherwise start the workers again whatever they died of. It is told of the
controller's states (a developer interface of Ray's): what users may subscribe to says nothing of workers that are
replaced because a node's time was over, or because the cluster grew. Imports little, for that process's sake.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState
from ray.train.v2.api.exceptions import PreemptionError

from dpa_ray.engine import pulse
from dpa_ray.engine.messages import FAILED, LastBeat, Progress
from dpa_ray.errors import LeaseTaken, NoAnswer, UserError

INNER = ("cause", "_base_exc", "health_check_failure", "controller_failure", "__cause__")
"""Where Ray's exceptions keep those that they wrap."""

SAVE_WITHIN_S = 120.0
"""So long workers have to save before those of a cluster that grew take their place."""
POLL_S = 0.5

KEPT = "what was saved stays, and the same command goes on from there"


class GaveUp(RuntimeError):
    """Workers failed too often of an error of their own."""


class Failures(ControllerCallback):
    """Told whenever workers are to be replaced. What it raises ends the run."""

    def __init__(self, board: Any, max_failures: int, max_preemptions: int | None, collective_timeout_s: float):
        """Limits as in the recipe's `cluster`: of what comes one after the other, with nothing new saved in between."""
        self.board, self.max_failures, self.max_preemptions = board, max_failures, max_preemptions
        self.collective_timeout_s = collective_timeout_s
        self.made = self.failures = self.preemptions = self.all_preemptions = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ten times a second the controller would write that it is too soon to look for room, 250 MB a day."""
        logging.getLogger("ray.train.v2._internal.execution.scaling_policy.elastic").setLevel(logging.INFO)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Raises: UserError that a worker raised, or where workers were lost too often; GaveUp where it was an error."""
        if current_state is previous_state:  # entered anew while there is no room for workers: nothing has happened
            return
        if isinstance(current_state, RestartingState):
            self._failed(current_state.training_failed_error)
        elif isinstance(current_state, ResizingState):
            self._save_first()
            number = current_state.scaling_decision.num_workers
            self._go_on(f"there is room for {number} workers now; they go on from the last checkpoint", "resize")

    def _save_first(self) -> None:
        """Nothing presses where a cluster grew: what was done since the last checkpoint need not be done again."""
        before: Progress = ray.get(self.board.progress.remote())
        self.board.want_save.remote()
        until = time.monotonic() + SAVE_WITHIN_S
        progress = before
        while progress.trains and progress.made == before.made and time.monotonic() < until:
            time.sleep(POLL_S)
            progress = ray.get(self.board.progress.remote())

    def _failed(self, error: Exception) -> None:
        failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
        causes = {rank: root_causes(err) for rank, err in failures.items()} or {-1: root_causes(error)}
        for found in causes.values():
            for cause in found:
                if isinstance(cause, UserError) and not isinstance(cause, NoAnswer):
                    raise for_user(cause)
        progress: Progress = ray.get(self.board.progress.remote())
        if progress.made > self.made:
            self.made, self.failures, self.preemptions = progress.made, 0, 0
        if isinstance(error, PreemptionError) or is_preempted(causes):
            self._preempted(error, causes, progress)
            return
        beats: dict[int, LastBeat] = ray.get(self.board.last_beats.remote())
        hang = describe_hang(causes, beats, self.collective_timeout_s)
        what = hang or describe(causes)
        self.failures += 1
        if self.failures > self.max_failures:
            times = f", {self.failures} times without a new checkpoint in between" if self.failures > 1 else ""
            lost = any(isinstance(c, RayActorError) for found in causes.values() for c in found)
            raise (UserError if lost or hang else GaveUp)(
                f"{what}{times} (cluster.max_failures: {self.max_failures}); {KEPT}"
            )
        self._go_on(
            f"{what}; going on from the last checkpoint (failure {self.failures} of {self.max_failures}, {progress})",
            "failure",
        )

    def _preempted(self, error: Exception, causes: dict[int, list[BaseException]], progress: Progress) -> None:
        self.preemptions += 1
        self.all_preemptions += 1
        info = getattr(error, "preemption_info", None)
        ranks = (
            info.preempted_ranks if info is not None else [r for r, found in causes.items() if is_preempted({r: found})]
        )
        whose = f"of worker {', '.join(map(str, ranks))}"
        if self.max_preemptions is not None and self.preemptions > self.max_preemptions:
            raise UserError(
                f"a node was taken away, that {whose}, {self.preemptions} times without a new checkpoint in between, {progress} "
                f"(cluster.max_preemptions: {self.max_preemptions}): nodes go faster than the run gets anywhere. Save more "
                f"often (checkpoint.every_s), or take nodes that stay longer; {KEPT}"
            )
        self._go_on(
            f"a node was taken away, that {whose} (preemption {self.all_preemptions}, {progress}); going on from the last "
            "checkpoint with what is left",
            "preemption",
        )

    def _go_on(self, text: str, why: str) -> None:
        self.board.put.remote("note", {"text": text})
        self.board.put.remote(FAILED, {"why": why})


def is_preempted(causes: dict[int, list[BaseException]]) -> bool:
    """Did any worker die because its node was taken away?"""
    return any(isinstance(c, RayActorError) and c.preempted for found in causes.values() for c in found)


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


def describe_hang(causes: dict[int, list[BaseException]], beats: dict[int, LastBeat], timeout_s: float) -> str | None:
    """Which workers waited in vain and for whom, where that is what the others failed of; else None.

    It is, where a worker's process does not answer, where a collective's time was over, and where a worker died that had
    waited for others for long: NCCL ends a process whose collective does not.
    """
    gone_still_s = pulse.STILL_FRACTION * timeout_s
    silent = {r for r, found in causes.items() if any(isinstance(c, WorkerHealthCheckTimeoutError) for c in found)}
    timed_out = [
        r for r, found in causes.items()
        if r in beats and beats[r].beat.waits and any(isinstance(c, RuntimeError) and _is_timeout(c) for c in found)
    ]  # fmt: skip
    aborted = [
        r for r, found in causes.items()
        if r in beats and beats[r].beat.in_collective and pulse.waits_since(beats[r]) >= gone_still_s
        and any(isinstance(c, RayActorError) for c in found)
    ]  # fmt: skip
    if not (silent or timed_out or aborted):
        return None
    silent |= {rank for rank, last in beats.items() if last.silent_s >= gone_still_s}
    whose = f", look at that process and its machine (worker {', '.join(map(str, sorted(silent)))})" if silent else ""
    return (
        f"the workers have waited for each other for longer than {timeout_s:g} s (cluster.collective_timeout_s): "
        f"{pulse.describe(beats, silent)}. If it comes again{whose}, or set cluster.collective_timeout_s higher"
    )


def _is_timeout(err: BaseException) -> bool:
    """torch's: a collective has no exception of its own for it."""
    return "timed out" in str(err).lower()


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
