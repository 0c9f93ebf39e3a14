"""Does a run bring the nodes that it needs, spot ones first, and give them back? Ray's own autoscaler (v2) from no workers,
on a host of its own; nodes are raylets there that say they have GPUs, and CPUs do the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests import hosts, tiny_models
from tests.hosts import PORT, Host
from tests.integration.runs import STAGES, Run, make_recipe, start_dpa

WHY_NOT = hosts.missing()
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(WHY_NOT), reason=f"no network namespaces: {WHY_NOT}")]

H100 = {"ray.io/accelerator-type": "H100"}
IDLE_S = 12


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Host]:
    with hosts.network(tmp_path / "hosts", ["head"]) as there:
        yield there["head"]


def cluster(head: Host, folder: Path, **provider: Any) -> dict[str, Any]:
    """What `ray up` would be given: GPU nodes on spot first, on demand else, of another type too; none to begin with."""

    def gpus(kind: str, accelerator: str, priority: int) -> dict[str, Any]:
        labels = {"ray.io/accelerator-type": accelerator, "market-type": kind}
        return {
            "resources": {"CPU": 2, "GPU": 2}, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": 2,
            "priority": priority,
        }  # fmt: skip

    commands = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands")
    return {
        **{name: [] for name in (*commands, *starts)}, "auth": {}, "file_mounts": {}, "cluster_synced_files": [],
        "cluster_name": "test", "max_workers": 4, "idle_timeout_minutes": IDLE_S / 60, "head_node_type": "ray.head.default",
        "provider": {
            "type": "external", "module": "tests.scarce_nodes.ScarceNodes", "launch_multiple": True, "disable_node_updaters": True,
            "head_node_id": FAKE_HEAD_NODE_ID, "gcs_address": f"{head.address}:{PORT}", "log": str(folder / "nodes.jsonl"),
            "scarce": [], "boot_s": 0, **provider,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "other": gpus("spot", "A100", 30), "spot": gpus("spot", "H100", 20), "on-demand": gpus("on-demand", "H100", 10),
        },
    }  # fmt: skip


def grows(head: Host, env: dict[str, str], timeout_s: float = 60) -> str:
    """What `has_autoscaler` says there, once the autoscaler has had time to say something itself."""
    script = "import ray; from dpa_ray.engine.launch import has_autoscaler as has; ray.init(); print(has())"
    until, said = time.monotonic() + timeout_s, ""
    while said != "True" and time.monotonic() < until:
        done = subprocess.run([*head.enter, sys.executable, "-c", script], env=env, capture_output=True, text=True)
        said = (done.stdout.splitlines() or [done.stderr[-500:]])[-1]
    return said


def run_on(head: Host, folder: Path, recipe: dict[str, Any], **provider: Any) -> tuple[Run, Callable[[], list[Any]]]:
    """The main job on a cluster that grows; what came and went."""
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(cluster(head, folder, **provider)))
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(hosts.ROOT)}
    env |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    env |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    head.start_ray(head, env, folder, "--num-cpus=0", f"--autoscaling-config={config}")
    job = {"RAY_ADDRESS": f"{head.address}:{PORT}", "RAY_AUTH_MODE": "disabled"}
    begun = time.time()
    assert grows(head, {**env, **job}) == "True"
    run = start_dpa(recipe, folder / "store", "run", env=job, prefix=head.enter).finished(420)
    log = folder / "nodes.jsonl"

    def events() -> list[Any]:
        lines = log.read_text().splitlines() if log.exists() else []
        return [(e["what"], e["kind"], round(e["at"] - begun, 1)) for e in map(json.loads, lines)]

    return run, events


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> dict[str, Any]:
    folder = assets_dir / "autoscaler"
    data = (
        tiny_models.make_captions(folder / "captions", 20, text_only=(4,), seed=5),
        tiny_models.make_conversations(folder / "conversations", 20, text_only=(7,), seed=6),
    )
    made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), *data, method="vanilla")
    made["cluster"] = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1.5, "label_selector": H100}
    for stage in STAGES:
        made["stages"][stage] |= {"lr": 1e-3, "max_steps": 4}
    return made


@pytest.mark.parametrize(
    ("scarce", "boot_s", "kind"),
    [
        pytest.param([], 0, "spot", id="spot nodes come first"),
        pytest.param(["spot"], 0, "on-demand", id="on demand where there are none"),
        pytest.param([], 75, "spot", id="nodes that take longer than Ray Train waits at a time"),
    ],
)
def test_nodes_come_for_a_run_and_go_after_it(
    tmp_path: Path, head: Host, recipe: dict[str, Any], scarce: list[str], boot_s: int, kind: str
) -> None:
    if scarce:  # Ray asks for what was refused again and again
        other = {"fallback_label_selector": {"market-type": "on-demand"}, "fallback_after_s": 30}
        recipe = {**recipe, "cluster": recipe["cluster"] | other}
    run, events = run_on(head, tmp_path, recipe, scarce=scarce, boot_s=boot_s)
    assert run.returncode == 0, f"{events()}\n{run.output}"
    assert "waiting for nodes, 600 s at most (cluster.start_timeout_s)" in run.stdout
    came = [kind for what, kind, _ in events() if what == "came"]
    assert came == [kind, kind], events()
    assert [k for what, k, _ in events() if what == "refused"][:1] == scarce, events()
    until = time.monotonic() + 10 * IDLE_S
    while sum(what == "went" for what, _, _ in events()) < 2:
        assert time.monotonic() < until, f"nodes stay: {events()}"
        time.sleep(0.5)
    print(*events(), sep="\n", file=sys.stderr)
    wall_s = run.info()["goodput"]["wall_time_s"]
    print(f"{wall_s:.0f} s in all", file=sys.stderr)
