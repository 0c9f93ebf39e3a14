"""Where do data tasks go in a cluster of nodes with and without GPUs? (With real nodes: tests/integration/test_placement.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import ray

from dpa_ray.data.ray_tasks import CpuNodesFirst


def node(number: int, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": f"{number:056x}", "Alive": alive, "Resources": resources}


def chosen(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], num: int) -> list[Any]:
    """The numbers of the nodes for so many tasks, or what else was said."""
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    places = CpuNodesFirst(0.25)
    found = [places.next() for _ in range(num)]
    return [each if isinstance(each, str) else int(each.node_id, 16) for each in found]


def test_tasks_go_to_the_nodes_without_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(1, CPU=8, GPU=4), node(2, CPU=4), node(3, CPU=4), node(4, CPU=0), node(5, alive=False, CPU=4)]
    found = chosen(monkeypatch, nodes, 4)
    assert sorted(found[:2]) == [2, 3], "not the head without CPUs, nor a node that went"
    assert found[2:] == found[:2]


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([node(1, CPU=8), node(2, CPU=8)], id="no GPUs at all"),
        pytest.param([node(1, CPU=8, GPU=4), node(2, CPU=0)], id="no node without GPUs that has CPUs"),
    ],
)
def test_without_nodes_of_both_kinds_tasks_are_spread(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]
) -> None:
    assert chosen(monkeypatch, nodes, 2) == ["SPREAD", "SPREAD"]


def test_a_full_node_is_not_waited_for_and_nodes_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(1, CPU=8, GPU=4), node(2, CPU=4)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    places = CpuNodesFirst(0.25)
    first = places.next()
    assert first.soft
    assert first._spill_on_unavailable
    nodes[1]["Alive"] = False
    assert int(places.next().node_id, 16) == 2, "not yet looked at again"
    places.LOOK_EVERY_S = 0.0
    assert places.next() == "SPREAD"
