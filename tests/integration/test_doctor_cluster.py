"""Does the doctor see what a real Ray cluster has, and what does not fit on it?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes that say they have two GPUs each, of a type whose memory is known."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(
            num_cpus=2, num_gpus=2, resources={"accelerator_type:L4": 1}, env_vars={"RAY_AUTH_MODE": "disabled"}
        )
    yield made
    made.shutdown()


def doctor(cluster: Cluster, store: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the checks by name."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "jobs/doctor.py", *arguments, "--json", "--store", str(store)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_workers_gpus_and_their_memory_are_those_of_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    code, found = doctor(cluster, tmp_path / "store", "cluster={workers: 4, gpus_per_worker: 1, cpus_per_worker: 0.5}")
    assert code == 1, "a folder is no store for three nodes"
    assert sum(found["cluster"]["workers_by_node"]) == 4
    assert "expected a store that all 3 nodes reach" in found["cluster"]["detail"]
    assert found["memory"]["status"] == "ok"
    assert "24.0 GiB of a GPU" in found["memory"]["detail"]

    _, found = doctor(cluster, tmp_path / "store", "cluster={workers: 5, gpus_per_worker: 1, cpus_per_worker: 0.5}")
    assert found["cluster"]["status"] == "fail"
    assert "expected room for 5 workers of 0.5 CPU and 1 GPU each" in found["cluster"]["detail"]
    assert "found room for 4 on 3 nodes" in found["cluster"]["detail"]
