"""Does each part of a run go where it belongs: workers to the nodes with their labels and together, data tasks to nodes
without GPUs? A real cluster on this machine, whose nodes say that they have GPUs and labels; CPUs do the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.state import list_actors, list_tasks

from dpa_ray.engine.placing import matches
from tests import tiny_models
from tests.integration.runs import STAGES, make_recipe, start_dpa

pytestmark = pytest.mark.full

SPOT = {"ray.io/accelerator-type": "H100", "market-type": "spot"}
ON_DEMAND = {"ray.io/accelerator-type": "H100", "market-type": "on-demand"}
OTHER = {"ray.io/accelerator-type": "A100", "market-type": "spot"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head for the driver alone, two nodes of each kind with GPUs, one node without."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    env = {"RAY_AUTH_MODE": "disabled"}
    for labels in (OTHER, ON_DEMAND, SPOT, SPOT):
        made.add_node(num_cpus=4, num_gpus=4, labels=dict(labels), env_vars=env)
    made.add_node(num_cpus=1, labels={"market-type": "on-demand"}, env_vars=env)
    yield made
    ray.shutdown()
    made.shutdown()


def labels_by_node() -> dict[str, dict[str, str]]:
    return {node["NodeID"]: node["Labels"] for node in ray.nodes()}


def test_selectors_mean_what_ray_takes_them_for(cluster: Cluster) -> None:
    """Each selector's own placement group of one bundle for every node that should match, and not for one more."""
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Resources"].get("CPU")]
    for selector in (SPOT, {"market-type": "!spot"}, {"market-type": "in(spot, reserved)"}, {"no": "!in(a, b)"}):
        num = sum(matches(node["Labels"], selector) for node in nodes)
        for count, fits in ((num, True), (num + 1, False)):
            group = ray.util.placement_group(
                [{"CPU": 1}] * count, strategy="STRICT_SPREAD", bundle_label_selector=[selector] * count
            )
            assert group.wait(10 if fits else 2) == fits, (selector, count)
            if fits:
                where = PlacementGroupSchedulingStrategy(group, 0)
                node = ray.get(ray.remote(num_cpus=1)(_node_id).options(scheduling_strategy=where).remote(), timeout=60)
                assert matches(labels_by_node()[node], selector)
            ray.util.remove_placement_group(group)


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_workers_are_packed_on_their_nodes_and_data_is_made_on_those_without_gpus(
    tmp_path: Path, cluster: Cluster, assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable
) -> None:
    """Two workers of 2 CPUs fit on one of the two spot nodes, and go there together; of more data tasks than the node
    without GPUs holds, the rest goes elsewhere, and nobody waits."""
    folder = assets_dir / "placement"
    data = (
        tiny_models.make_captions(folder / "captions", 30, text_only=(), seed=5),
        tiny_models.make_conversations(folder / "conversations", 30, text_only=(), seed=6),
    )
    recipe = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="vanilla", data__workers=2)
    recipe["cluster"] = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 2, "label_selector": SPOT}
    for stage in STAGES[1:]:
        recipe["stages"][stage] |= {"lr": 1e-3, "epochs": 4, "max_steps": 20}
    env = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    run = start_dpa(recipe, tmp_path / "store", "run", env=env).finished()
    assert run.returncode == 0, run.output

    ray.init(address=cluster.address, log_to_driver=False)
    labels = labels_by_node()
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0) for node in ray.nodes()}
    actors = list_actors(detail=True, limit=1000)
    workers = [actor.node_id for actor in actors if "RayTrainWorker" in actor.class_name]
    assert len(workers) == 2, actors
    assert len(set(workers)) == 1, "packed"
    assert matches(labels[workers[0]], SPOT)
    feeders = {actor.node_id for actor in actors if actor.class_name == "Feeder"}
    assert feeders == set(workers), "beside its worker"
    tasks = [task.node_id for task in list_tasks(detail=True, limit=10_000) if task.name.endswith("_load")]
    on_cpus = sum(gpus[node] == 0 for node in tasks if node)
    print(f"{on_cpus} of {len(tasks)} data tasks on the node without GPUs", os.linesep)
    assert on_cpus > len(tasks) / 2
