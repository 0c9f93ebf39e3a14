"""Do the workers fit on the nodes, each whole on one, and is there room left for the tasks that feed them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpa_ray.data.ingest import TASK_CPUS
from dpa_ray.recipe_running import ClusterSection

Resources = Mapping[str, float]
"""What a node has, or a worker asks for, by Ray's names: CPU, GPU."""

Labels = Mapping[str, str]
"""Of a node, as Ray knows them."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Placement:
    """What of a run fits on the nodes there are."""

    num_wanted: int  # workers: of an elastic run, the most
    num_needed: int  # the fewest with which it starts
    num_placed: int
    num_tasks_wanted: int  # data tasks at once, of all placed workers
    num_tasks_placed: int
    workers_by_node: tuple[int, ...]

    @property
    def is_possible(self) -> bool:
        """Will the run start, and its data come?"""
        return self.num_placed >= self.num_needed and self.num_tasks_placed > 0


def worker_resources(cluster: ClusterSection) -> dict[str, float]:
    """What one training worker asks for."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def matches(labels: Labels, selector: Labels) -> bool:
    """Has a node with `labels` what `selector` asks for: `v`, `!v`, `in(v, w)` or `!in(v, w)` of each label?"""

    def holds(label: str, condition: str) -> bool:
        wanted = condition.removeprefix("!")
        values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
        return (labels.get(label) in [value.strip() for value in values]) != condition.startswith("!")

    return all(holds(label, condition) for label, condition in selector.items())


def place(
    nodes: Sequence[Resources], cluster: ClusterSection, tasks_per_worker: int, labels: Sequence[Labels] = ()
) -> Placement:
    """Lay the workers on those of `nodes` whose `labels` (in the same order; none where left out) the recipe asks for, then
    data tasks (`data.workers` of each) on what is left of all."""
    asked = worker_resources(cluster)
    by_node = []
    left = cluster.max_workers
    for node, own in zip(nodes, labels or [{} for _ in nodes], strict=True):
        fitting = min(int((node.get(name, 0.0) + _ROUNDING) // amount) for name, amount in asked.items())
        if not matches(own, cluster.label_selector):
            fitting = 0
        by_node.append(min(left, fitting))
        left -= by_node[-1]
    num_placed = sum(by_node)
    free = [node.get("CPU", 0.0) - n * cluster.cpus_per_worker for node, n in zip(nodes, by_node, strict=True)]
    room = sum(int((max(0.0, cpus) + _ROUNDING) // TASK_CPUS) for cpus in free)
    wanted = num_placed * tasks_per_worker
    return Placement(
        cluster.max_workers, cluster.min_workers, num_placed, wanted, min(room, max(1, wanted)), tuple(by_node)
    )


def on_labels(cluster: ClusterSection) -> str:
    """` on nodes labelled ...`, of what is asked for; empty where any node will do."""
    asked = ", ".join(f"{label}: {condition}" for label, condition in cluster.label_selector.items())
    return f" on nodes labelled {{{asked}}}" if asked else ""


def problems(found: Placement, nodes: Sequence[Resources], cluster: ClusterSection) -> list[str]:
    """What does not fit, what was asked for and what there is; nothing where all fits."""
    asked = " and ".join(f"{amount:g} {name}" for name, amount in worker_resources(cluster).items()) + on_labels(
        cluster
    )
    there = "; ".join(
        f"{node.get('CPU', 0.0):g} CPU" + (f", {node['GPU']:g} GPU" if node.get("GPU") else "") for node in nodes
    )
    where = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} ({there})" if len(nodes) <= 8 else f"{len(nodes)} nodes"
    if found.num_placed < found.num_needed:
        return [
            f"expected room for {found.num_needed} workers of {asked} each, whole on one node; found room for "
            f"{found.num_placed} on {where}. Add nodes, or set cluster.workers, cluster.gpus_per_worker (0 trains on CPUs) "
            "or cluster.cpus_per_worker to fit"
        ]
    if found.num_tasks_placed == 0:
        return [
            f"expected {TASK_CPUS:g} CPU for each data task beside {found.num_placed} workers of {asked}, found none left on "
            f"{where}: no batch would ever come. Lower cluster.cpus_per_worker, or add CPUs"
        ]
    if found.num_tasks_placed < found.num_tasks_wanted:
        return [
            f"{found.num_tasks_placed} of {found.num_tasks_wanted} data tasks (data.workers, {TASK_CPUS:g} CPU each) fit beside the "
            f"workers on {where}: training may wait for data. Lower cluster.cpus_per_worker or data.workers, or add CPUs"
        ]
    return []
