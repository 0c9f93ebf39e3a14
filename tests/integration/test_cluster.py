"""Does a run outlive the nodes of its cluster? A real cluster of several raylets on this machine; nodes go and come."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests import tiny_models
from tests.integration.runs import STAGES, Run, losses, make_recipe, start_dpa

pytestmark = pytest.mark.full

NUM_STEPS = 60
ELASTIC = {"workers": {"min": 1, "max": 2}, "gpus_per_worker": 0, "cpus_per_worker": 1.5}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head for the driver alone; the tests add nodes for a worker and its data tasks each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> Callable[..., dict[str, Any]]:
    folder = assets_dir / "cluster"
    data = (
        tiny_models.make_captions(folder / "captions", 45, text_only=(4, 20), seed=5),
        tiny_models.make_conversations(folder / "conversations", 45, text_only=(7, 30), seed=6),
    )

    def make(**changes: Any) -> dict[str, Any]:
        made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="vanilla", **changes)
        made["checkpoint"] = {"every_steps": 2, **changes.get("checkpoint", {})}
        for stage, steps in zip(STAGES, (2, NUM_STEPS, 4), strict=True):
            made["stages"][stage] |= {"lr": 1e-3, "global_batch_size": 8, "epochs": 100, "max_steps": steps}
        return made

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., dict[str, Any]]) -> Run:
    run = start_dpa(recipe(), tmp_path_factory.mktemp("whole") / "store", "run").finished()
    assert run.returncode == 0, run.output
    return run


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=2, env_vars={"RAY_AUTH_MODE": "disabled"})


def start(cluster: Cluster, made: dict[str, Any], store: Path) -> Any:
    made["cluster"] = dict(ELASTIC)
    return start_dpa(made, store, "run", env={"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"})


def assert_same(run: Run, expected: Run) -> None:
    assert run.returncode == 0, run.output
    for stage in STAGES[1:]:
        assert run.samples(stage) == expected.samples(stage), stage
        assert losses(run, stage) == pytest.approx(losses(expected, stage), rel=1e-5), stage


def test_a_node_that_is_lost_costs_its_worker_only(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]], whole: Run
) -> None:
    add_node(cluster)
    second = add_node(cluster)
    running = start(cluster, recipe(), tmp_path / "store")
    running.wait_for("proxy_mllm", 6)
    begun = time.monotonic()
    cluster.remove_node(second, allow_graceful=False)
    running.wait_for("proxy_mllm", 12)
    print(f"a node lost: {time.monotonic() - begun:.0f} s to the sixth step after", file=sys.stderr)
    run = running.finished()
    assert "saved by 2 workers, on 1" in run.stdout, run.output
    assert_same(run, whole)


def test_a_node_that_says_that_it_will_go_makes_the_run_save_at_once(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]], whole: Run
) -> None:
    add_node(cluster)
    second = add_node(cluster)
    running = start(cluster, recipe(checkpoint={"every_steps": None, "every_s": 3600}), tmp_path / "store")
    running.wait_for("proxy_mllm", 6)
    drain = [
        "ray", "drain-node", "--address", cluster.address, "--node-id", second.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "15",
    ]  # fmt: skip
    done = subprocess.run(drain, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    run = running.finished()
    assert "a node is about to go; step" in run.stdout, run.output
    assert_same(run, whole)
