"""When Ray Train itself ends: may the work go on, and what must be out of the way before?"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._raylet import PlacementGroupID
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.exceptions import ControllerError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpa_ray.engine.failures import GaveUp, first_line, root_causes
from dpa_ray.engine.messages import Progress
from dpa_ray.errors import UserError

_log = logging.getLogger(__name__)

END_S = 20.0
"""How long a controller that is killed may take to be gone, as its driver sees it."""


class _Trainer(TorchTrainer):
    """One whose controller can be ended by another thread than the one that waits in `fit`. (Ray's own keeps it to itself.)"""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.controller: Any = None  # an actor, once there is one
        self.unwanted = threading.Event()

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **get_env_vars_to_propagate()}
        remote = ray.remote(num_cpus=0, scheduling_strategy=here(), runtime_env={"env_vars": environment})
        self.controller = remote(TrainController).remote(**arguments)
        if self.unwanted.is_set():
            ray.kill(self.controller)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())

    def end(self) -> None:
        """The controller is killed, and its workers with it: `fit` raises ActorDiedError."""
        self.unwanted.set()
        if self.controller is not None:
            ray.kill(self.controller)


class Fit(threading.Thread):
    """`trainer.fit` in a thread, so that the driver can give up waiting, and Ctrl-C is the driver's own."""

    def __init__(self, **trainer: Any):
        """`trainer`: TorchTrainer's arguments."""
        super().__init__(name="fit", daemon=True)
        self.trainer = _Trainer(**trainer)
        self.error: Exception | None = None
        self._asked: Any = None
        self._asked_s = 0.0
        self.start()

    def run(self) -> None:
        try:
            self.trainer.fit()
        except Exception as err:
            self.error = err

    @property
    def ended(self) -> bool:
        return not self.is_alive()

    def look(self, limit_s: float) -> str | None:
        """Asks the controller for a sign of life, now and then. One that gives none for `limit_s` is killed: this thread ends, as
        of one that dies by itself. Returns: that, for people."""
        controller, now = self.trainer.controller, time.monotonic()
        if controller is None or self.trainer.unwanted.is_set():
            return None
        if self._asked is None or ray.wait([self._asked], timeout=0)[0]:
            self._asked = controller.__ray_call__.remote(bool)  # runs in its loop, which `__ray_ready__` does not
            self._asked_s = now
        elif now - self._asked_s >= limit_s:
            self.trainer.end()
            return f"Ray Train's controller has not answered for {limit_s:g} s: it is killed"
        return None

    def end(self) -> None:
        """Ends the controller and its workers, where they still live, and waits until this thread has left Ray: a `ray.shutdown`
        under it takes the process with it at times, before it has said why."""
        self.trainer.end()
        self.join(END_S)
        try:
            self.free()
        except Exception as err:  # Ray's: it is what ended the work, then
            _log.warning("workers may not have been ended: %s", err)

    def free(self) -> None:
        """Ray keeps what a dead controller asked for as long as the driver lives. Workers that are still there die with it."""
        if self.trainer.controller is not None:
            for group in groups_of(self.trainer.controller._actor_id.hex()):
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


class Relaunches:
    """Failures that Ray Train does not recover from: its controller died (killed, or out of memory), or workers died or did not
    find each other while their process group was set up."""

    def __init__(self, limit: int):
        """Of failures one after the other, with nothing new saved in between: as `cluster.max_failures`."""
        self.limit, self.text = limit, ""
        self.made = self.number = 0

    def recovers(self, fit: Fit, progress: Progress) -> bool:
        """May the work that `fit` ended go on? Then what its workers had is free, and `text` is for people."""
        what = self._what(fit.error)
        if what is None:
            return False
        if progress.made > self.made:
            self.made, self.number = progress.made, 0
        self.number += 1
        if self.number > self.limit:
            return False
        fit.free()
        self.text = f"{what}; others are started, and go on from the last checkpoint (failure {self.number} of {self.limit}, {progress})"
        return True

    def _what(self, error: Exception | None) -> str | None:
        """One line on what happened; None where it is not one of those failures."""
        if isinstance(error, ray.exceptions.ActorDiedError):
            return "Ray Train's controller died, and its workers with it"
        causes = root_causes(error) if isinstance(error, ControllerError) else []
        if not causes or any(isinstance(cause, UserError | GaveUp) for cause in causes):
            return None
        return f"workers could not be started: {type(causes[-1]).__name__}: {first_line(causes[-1])}"


def here() -> NodeAffinitySchedulingStrategy:
    """Scheduling on the driver's node, not beside it: with `soft` Ray leaves a head without CPUs for a node that may go."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def groups_of(actor: str) -> list[str]:
    """The placement groups, by their ids, that the actor with this id made and nobody removed."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    table = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return [
        group.placement_group_id.hex() for group in table
        if group.creator_actor_id.hex() == actor and group.state != PlacementGroupTableData.REMOVED
    ]  # fmt: skip
