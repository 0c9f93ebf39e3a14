"""What is there to run on: the nodes, their GPUs and how much memory these have? Asked of Ray where a cluster is named."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dpa_ray.engine import launch
from dpa_ray.recipe_running import ClusterSection

ASK_TIMEOUT_S = 30.0

GPU_GIB = {
    "V100": 16, "P100": 16, "T4": 16, "P4": 8, "K80": 12, "A10G": 24, "L4": 24, "L40S": 48, "A100": 40, "A100-40G": 40,
    "A100-80G": 80, "H100": 80, "H200": 141, "H20": 96, "B200": 180,
}  # fmt: skip
"""By Ray's accelerator type; of types that come in several sizes the smallest. For nodes that do not answer themselves."""


@dataclass(frozen=True)
class Node:
    """One machine. Bytes are 0 where they are not known."""

    resources: dict[str, float]  # CPU, GPU
    memory_bytes: int = 0
    gpu_bytes: int = 0  # of its smallest GPU
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Nodes:
    """Where the run would be, in words, and its machines."""

    where: str
    is_cluster: bool
    nodes: tuple[Node, ...] = field(default=())

    @property
    def gpu_bytes(self) -> int:
        """Of the smallest GPU there is, 0 where none is known."""
        return min((node.gpu_bytes for node in self.nodes if node.gpu_bytes), default=0)

    @property
    def labels(self) -> list[dict[str, str]]:
        return [node.labels for node in self.nodes]

    @property
    def resources(self) -> list[dict[str, float]]:
        return [node.resources for node in self.nodes]


@contextmanager
def nodes(cluster: ClusterSection) -> Iterator[Nodes]:
    """The nodes of the cluster that RAY_ADDRESS names, or this machine, on which a run would start Ray by itself.

    Raises: UserError where the named cluster does not answer.
    """
    if not os.environ.get("RAY_ADDRESS"):
        yield Nodes("this machine (RAY_ADDRESS names no cluster)", False, (this_machine(cluster),))
        return
    import ray

    was_there = ray.is_initialized()
    where = launch.connect(cluster)
    try:
        yield Nodes(where, True, tuple(_ray_nodes()))
    finally:
        if not was_there:
            ray.shutdown()


def this_machine(cluster: ClusterSection) -> Node:
    """As the local Ray that a run starts counts it: CPUs as many as the workers ask for, and one for data."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu_bytes = min((torch.cuda.get_device_properties(i).total_memory for i in range(num_gpus)), default=0)
    resources = {"CPU": float(launch.local_cpus(cluster)), "GPU": float(num_gpus)}
    return Node(resources, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), gpu_bytes)


def _ray_nodes() -> list[Node]:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = {node["NodeID"]: _ask(node["NodeID"]) for node in alive if node["Resources"].get("GPU")}
    found = []
    for node in alive:
        resources = node["Resources"]
        types = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
        gpu_bytes = _answer(asked[node["NodeID"]]) if node["NodeID"] in asked else 0
        if not gpu_bytes and node["NodeID"] in asked:
            gpu_bytes = min((GPU_GIB[name] * 2**30 for name in types if name in GPU_GIB), default=0)
        kept = {name: float(resources[name]) for name in ("CPU", "GPU") if name in resources}
        found.append(Node(kept, int(resources.get("memory", 0)), gpu_bytes, dict(node["Labels"])))
    return found


def _ask(node_id: str) -> Any:
    """A task on that node that books nothing: it asks the driver, and leaves the GPUs to whoever has them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(smallest_gpu_bytes).options(scheduling_strategy=there).remote()


def _answer(asked: Any) -> int:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return int(ray.get(asked, timeout=ASK_TIMEOUT_S))
    except (GetTimeoutError, RayError):
        return 0


def smallest_gpu_bytes() -> int:
    """Memory of this machine's smallest GPU as its driver says it, 0 where there is none that does."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return min(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
