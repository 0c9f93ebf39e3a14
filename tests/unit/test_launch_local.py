"""Is a run refused at once where resources never come, and not where they may?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dpa_ray.engine import launch
from dpa_ray.errors import UserError
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.store.fs import Store

OTHERS = {"ray.io/market-type": "on-demand"}
CLUSTER = ClusterSection(workers=2, gpus_per_worker=0, cpus_per_worker=1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `connect` asks of Ray, which does not start, and has one node that is too small."""
    asked: dict[str, Any] = {}
    node = {"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}}

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **values: asked.update(values))
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    for name in (launch.LOCAL, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launch.DRIVER_ENVIRONMENT.items():  # `connect` sets them for good
        monkeypatch.setenv(name, value)
    return asked


@pytest.mark.parametrize("in_trial", [False, True])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_may_grow_and_a_local_ray_does_not(
    address: str | None, in_trial: bool, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial's driver is an actor: it has the runtime environment that the sweep's driver gave, and no RAY_ADDRESS."""
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    launch.connect(CLUSTER)
    actor = "0123" if in_trial else None
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor))
    if in_trial:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        for name, value in started["runtime_env"]["env_vars"].items():
            monkeypatch.setenv(name, value)
    if address is not None:
        launch.check_resources(CLUSTER)  # its autoscaler is asked by starting workers, and by nothing else
        return
    with pytest.raises(UserError, match="cannot place 2 workers: expected 2 CPU, found 1 CPU"):
        launch.check_resources(CLUSTER)


def test_only_nodes_with_the_labels_count(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: None))
    fitting = ClusterSection(workers=1, gpus_per_worker=0, cpus_per_worker=1)
    launch.check_resources(fitting)
    labelled = fitting.model_copy(update={"label_selector": {"market-type": "spot"}})
    with pytest.raises(UserError, match=r"expected 1 CPU on nodes labelled \{market-type: spot\}, found 0 CPU"):
        launch.check_resources(labelled)


def test_a_controller_that_dies_is_told_with_what_to_do() -> None:
    from ray.exceptions import ActorDiedError

    from dpa_ray.engine.launch import _for_user
    from dpa_ray.errors import UserError

    found = _for_user(ActorDiedError())
    assert isinstance(found, UserError)
    assert "the same command goes on from there" in str(found)


def test_a_folder_is_no_store_for_several_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nodes(*machines: str) -> None:
        made = [{"Alive": True, "NodeManagerHostname": machine} for machine in machines]
        monkeypatch.setattr(ray, "nodes", lambda: [*made, {"Alive": False, "NodeManagerHostname": "gone"}])

    local, shared = Store(str(tmp_path)), Store("s3://bucket/dpa")
    nodes("head", "head")  # two nodes of one machine, as in tests
    launch.check_reach(local)
    nodes("head", "one")
    launch.check_reach(shared)
    with pytest.raises(
        UserError, match=r"all 2 machines of the cluster reach \(head, one\), found the folder .*take s3://"
    ):
        launch.check_reach(local)


def test_other_nodes_are_asked_for_beside_those_of_others_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is one for the whole cluster: another run's takes its place, and the end of that one ends it."""
    asked, notes, now = list[int](), list[str](), [1000.0]
    free = {"a": {"CPU": 0.5}, "b": {"CPU": 2.0}, "c": {}}
    nodes = [
        {"NodeID": name, "Alive": True, "Labels": labels, "Resources": {"CPU": 2.0}}
        for name, labels in (("a", OTHERS), ("b", OTHERS), ("c", {"ray.io/market-type": "spot"}))
    ]
    monkeypatch.setattr(launch, "request_resources", lambda bundles, **_: asked.append(len(bundles)))
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    cluster = ClusterSection(
        workers=3, gpus_per_worker=0, cpus_per_worker=1, fallback_after_s=30, fallback_label_selector=OTHERS
    )
    starting = launch.Starting(cluster, notes.append)
    starting.check()
    assert asked == []
    for expected in ([5], [5, 5]):  # three workers of its own, and as many as two have room that others use
        now[0] += launch.ASK_AGAIN_S
        starting.check()
        starting.check()
        assert asked == expected
    free["a"] = {"CPU": 2.0}  # they are gone, and what came for this run is free as well
    now[0] += launch.ASK_AGAIN_S
    starting.check()
    assert asked == [5, 5, 3]
    assert len(notes) == 1
    starting.saw("workers_started")
    assert asked == [5, 5, 3, 0]
