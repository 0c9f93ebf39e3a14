"""When Ray Train itself ends: may the work go on, and what must be out of the way before?"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from dpa_ray.engine.failures import GaveUp, first_line, root_causes
from dpa_ray.engine.messages import FAILED, STARTED, Progress
from dpa_ray.errors import UserError


class Fit(threading.Thread):
    """`trainer.fit` in a thread, so that the driver can give up waiting, and Ctrl-C is the driver's own."""

    def __init__(self, trainer: TorchTrainer):
        super().__init__(name="fit", daemon=True)
        self.trainer = trainer
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.trainer.fit()
        except Exception as err:
            self.error = err

    @property
    def ended(self) -> bool:
        return not self.is_alive()


class Relaunches:
    """Failures that Ray Train does not recover from: its controller died (killed, or out of memory), or workers died or did not
    find each other while their process group was set up."""

    def __init__(self, limit: int):
        """Of failures one after the other, with nothing new saved in between: as `cluster.max_failures`."""
        self.limit, self.text = limit, ""
        self.made = self.number = 0
        self.group: str | None = None

    def saw(self, kind: str, values: dict[str, Any]) -> None:
        if kind == STARTED:
            self.group = values["group"]
        elif kind == FAILED:
            self.group = None  # others are on their way

    def recovers(self, error: Exception | None, progress: Progress) -> bool:
        """May the work that ended of `error` go on? Then what its workers had is free, and `text` is for people."""
        what = self._what(error)
        if what is None:
            return False
        if progress.made > self.made:
            self.made, self.number = progress.made, 0
        self.number += 1
        if self.number > self.limit:
            return False
        for group in self._held():  # Ray keeps a dead controller's as long as the driver lives
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
        self.group = None
        self.text = f"{what}; others are started, and go on from the last checkpoint (failure {self.number} of {self.limit}, {progress})"
        return True

    def _what(self, error: Exception | None) -> str | None:
        """One line on what happened; None where it is not one of those failures."""
        if isinstance(error, ray.exceptions.ActorDiedError):
            # of one that dies while its workers start, a trial of a sweep does not know what it holds
            if self.group is None and is_trial():
                return None
            return "Ray Train's controller died, and its workers with it"
        causes = root_causes(error) if isinstance(error, ControllerError) else []
        if not causes or any(isinstance(cause, UserError | GaveUp) for cause in causes):
            return None
        return f"workers could not be started: {type(causes[-1]).__name__}: {first_line(causes[-1])}"

    def _held(self) -> list[str]:
        """The placement groups that this run's workers had, or were to have."""
        if is_trial():
            return [] if self.group is None else [self.group]
        return groups_of_this_driver()


def is_trial() -> bool:
    """Does this process share its driver with other runs?"""
    return ray.get_runtime_context().get_actor_id() is not None


def groups_of_this_driver() -> list[str]:
    """The placement groups that its processes made and nobody removed, by their ids, which end with the driver's."""
    job: str = ray.get_runtime_context().get_job_id()
    return [
        str(group) for group, about in placement_group_table().items()
        if group.endswith(job) and about["state"] != "REMOVED"
    ]  # fmt: skip
