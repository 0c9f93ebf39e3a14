"""Does the work go on where Ray Train itself ends, and what becomes of a controller that stands still?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import ControllerError

from dpa_ray.engine.failures import GaveUp
from dpa_ray.engine.messages import Progress
from dpa_ray.engine.relaunching import Fit, Relaunches, groups_of
from dpa_ray.errors import UserError


class Ended:
    """A Fit that ended of `error`."""

    def __init__(self, error: Exception | None, freed: list[Exception | None]):
        self.error, self.freed = error, freed

    def free(self) -> None:
        self.freed.append(self.error)


def test_controllers_that_die_are_counted_until_something_is_saved() -> None:
    lost, died, freed = Relaunches(1), ActorDiedError(), list[Exception | None]()

    def recovers(error: Exception | None, made: int) -> bool:
        return lost.recovers(Ended(error, freed), Progress(made))  # type: ignore[arg-type]

    assert not recovers(RuntimeError("a worker's"), 0)
    assert not recovers(None, 0)
    assert freed == []
    assert recovers(died, 0)
    assert freed == [died]
    assert not recovers(died, 0)
    assert recovers(died, 1)
    assert freed == [died, died], "nothing is freed by Relaunches where the work is over"


def test_groups_are_an_actors_own_until_they_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        Group(placement_group_id=bytes([number]) * 18, creator_actor_id=bytes([actor]) * 16, state=at)
        for number, actor, at in (
            (1, 7, Group.CREATED),
            (2, 7, Group.REMOVED),
            (3, 8, Group.CREATED),
            (4, 7, Group.PENDING),
        )
    ]
    accessor = SimpleNamespace(get_placement_group_table=lambda: [group.SerializeToString() for group in table])
    monkeypatch.setattr(state, "_connect_and_get_accessor", lambda: accessor)
    assert groups_of("07" * 16) == ["01" * 18, "04" * 18]


def test_workers_that_do_not_start_are_started_again_unless_they_said_why() -> None:
    relaunches = Relaunches(1)

    def recovers(error: Exception) -> bool:
        return relaunches.recovers(Ended(error, []), Progress(0))  # type: ignore[arg-type]

    assert not recovers(ControllerError(UserError("the store is full")))
    assert not recovers(ControllerError(GaveUp("worker 0 failed, 4 times")))
    assert recovers(ControllerError(RuntimeError("connect() timed out")))
    assert "workers could not be started: RuntimeError: connect() timed out" in relaunches.text
    assert "(failure 1 of 1, before the first step)" in relaunches.text
    assert not recovers(ControllerError(RuntimeError("connect() timed out")))


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.ci
@pytest.mark.usefixtures("local_ray")
def test_a_controller_that_gives_no_sign_of_life_is_killed() -> None:
    class Controller:
        def __init__(self) -> None:
            self.stands = threading.Event()

        async def pid(self) -> int:
            return os.getpid()

        async def stand(self) -> None:
            self.stands.wait()

    controller: Any = ray.remote(num_cpus=0)(Controller).remote()
    ended = threading.Event()
    fit = Fit.__new__(Fit)
    fit.trainer = SimpleNamespace(controller=controller, unwanted=threading.Event(), end=ended.set)  # type: ignore[assignment]
    fit._asked, fit._asked_s = None, 0.0
    pid = ray.get(controller.pid.remote())
    for _ in range(3):
        assert fit.look(0.5) is None
        time.sleep(1.0)  # it answers: that is not silence
    controller.stand.remote()
    time.sleep(0.5)
    assert fit.look(0.5) is None, "what was asked before is answered"
    time.sleep(1.0)
    assert fit.look(0.5) == "Ray Train's controller has not answered for 0.5 s: it is killed"
    assert ended.is_set()
    fit.trainer.unwanted.set()
    assert fit.look(0.5) is None, "it is said once"
    os.kill(pid, signal.SIGKILL)
