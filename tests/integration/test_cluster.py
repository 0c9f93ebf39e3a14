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
from tests.integration.runs import ROOT, STAGES, Run, Running, losses, make_recipe, start_dpa
from tests.metadata_server import INTERRUPTION, MetadataServer

pytestmark = pytest.mark.full

NUM_STEPS = 240
ELASTIC = {"workers": {"min": 1, "max": 2}, "gpus_per_worker": 0, "cpus_per_worker": 1.5, "grow_every_s": 60}


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


def drain(cluster: Cluster, node: Any, deadline_s: int) -> None:
    """As a cloud's notice does: the node takes nothing new, and is to be gone after `deadline_s`."""
    command = [
        "ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
        "--deadline-remaining-seconds", str(deadline_s),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_node_that_says_that_it_will_go_makes_the_run_save_at_once(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]], whole: Run
) -> None:
    add_node(cluster)
    second = add_node(cluster)
    running = start(cluster, recipe(checkpoint={"every_steps": None, "every_s": 3600}), tmp_path / "store")
    running.wait_for("proxy_mllm", 6)
    drain(cluster, second, deadline_s=15)
    run = running.finished()
    assert "a node is about to go; step" in run.stdout, run.output
    assert_same(run, whole)


def lasting(made: dict[str, Any]) -> dict[str, Any]:
    """A stage 2 that lasts longer than anybody waits here, so that what comes by the clock comes while it trains."""
    made["stages"]["proxy_mllm"] |= {"epochs": 100_000, "max_steps": 100_000}
    return made


def wait_for_new_workers(running: Running, timeout_s: float = 300) -> int:
    """Until a run's workers were replaced once and train again; gives the last step then."""
    until = time.monotonic() + timeout_s
    while running.run.info().get("goodput", {}).get("num_restarts") != 1:
        assert running.process.poll() is None, "it ended"
        assert time.monotonic() < until, "workers were never replaced"
        time.sleep(0.1)
    step = int(running.run.metrics("proxy_mllm")[-1]["step"])
    running.wait_for("proxy_mllm", step + 4)
    return step + 4


def assert_same_so_far(run: Run, alone: Running, num_steps: int) -> None:
    """As a run on one worker, which is ended there too."""
    alone.wait_for("proxy_mllm", num_steps)
    expected = losses(alone.kill_all(), "proxy_mllm")[:num_steps]
    assert losses(run, "proxy_mllm")[:num_steps] == pytest.approx(expected, rel=1e-5)


def test_a_drain_whose_deadline_passes_while_workers_train_is_told_and_counted(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]]
) -> None:
    """No worker fails here: Ray Train replaces them when the time is over."""
    add_node(cluster)
    second = add_node(cluster)
    running = start(cluster, lasting(recipe()), tmp_path / "store")
    running.wait_for("proxy_mllm", 6)
    drain(cluster, second, deadline_s=15)
    step = wait_for_new_workers(running)
    run = running.kill_all()
    assert "a node is about to go; step" in run.stdout, run.output
    assert "a node was taken away, that of worker" in run.stdout, run.output
    assert "(preemption 1, after step" in run.stdout
    assert "saved by 2 workers, on 1" in run.stdout
    assert run.info()["goodput"]["lost_s"] > 0
    assert_same_so_far(run, start_dpa(lasting(recipe()), tmp_path / "alone" / "store", "run"), step)


def watch_spot_notices(server: MetadataServer, cluster: Cluster, node: Any) -> subprocess.Popen[str]:
    """As a node's start commands do; told its node, as all nodes of this cluster have one address."""
    command = [
        sys.executable, "-m", "dpa_ray.cluster.drain_watcher", "--metadata-url", server.url, "--poll-s", "0.5",
        "--address", cluster.address, "--node-id", node.node_id,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)


def test_a_spot_notice_drains_its_node_and_the_stage_goes_on_elsewhere(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]]
) -> None:
    """No checkpoint comes by itself here, and the node is gone when its time is over."""
    add_node(cluster)
    second = add_node(cluster)
    made = lasting(recipe(checkpoint={"every_steps": None, "every_s": 3600}))
    running = start(cluster, made, tmp_path / "store")
    saved = "checkpoints/proxy-mllm-*/step-*/manifest.json"
    times: dict[str, float] = {}

    def until(what: str, is_so: Callable[[], bool], timeout_s: float = 200) -> None:
        end = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
            assert running.process.poll() is None, "the run ended"
            time.sleep(0.02)
        times[what] = time.monotonic() - begun

    with MetadataServer("aws") as server:
        watcher = watch_spot_notices(server, cluster, second)
        running.wait_for("proxy_mllm", 6)
        server.wait_until_asked(INTERRUPTION)
        assert not list((tmp_path / "store").glob(saved))
        begun = time.monotonic()
        deadline = time.time() + 30
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(deadline))
        server.say(INTERRUPTION, f'{{"action": "terminate", "time": "{at}"}}')
        until("drained", lambda: watcher.poll() is not None)
        told = watcher.communicate()[1]
        assert watcher.returncode == 0, told
        assert "notice: AWS will terminate this spot instance, in " in told
        assert f"drained node {second.node_id}, " in told
    until("saved", lambda: bool(list((tmp_path / "store").glob(saved))))
    step = int(running.run.metrics("proxy_mllm")[-1]["step"])
    time.sleep(max(0.0, deadline - time.time()))
    cluster.remove_node(second, allow_graceful=False)
    last = wait_for_new_workers(running)
    times["goes on elsewhere"] = time.monotonic() - begun
    logs = tmp_path / "store" / "runs" / "run" / "logs"  # copied when the workers were replaced, from both nodes
    until("logs", lambda: any("a node was taken away" in file.read_text() for file in logs.glob("*/driver.log")))
    until("workers' logs", lambda: bool(list(logs.glob("*/*/worker-*"))))
    print("after the notice:", *(f"{what} {at_s:.1f} s" for what, at_s in times.items()), sep="  ", file=sys.stderr)
    run = running.kill_all()
    assert last > step
    assert "a node is about to go; step" in run.stdout, run.output
    assert "a node was taken away, that of worker" in run.stdout, run.output
    assert "saved by 2 workers, on 1" in run.stdout
    steps = [line["step"] for line in run.metrics("proxy_mllm")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_node_that_comes_while_a_run_trains_gets_a_worker(
    tmp_path: Path, cluster: Cluster, recipe: Callable[..., dict[str, Any]]
) -> None:
    """No checkpoint comes by itself: what was trained is saved as a node came."""
    add_node(cluster)
    made = lasting(recipe(checkpoint={"every_steps": None, "every_s": 3600}))
    running = start(cluster, made, tmp_path / "store")
    running.wait_for("proxy_mllm", 6)
    add_node(cluster)
    step = wait_for_new_workers(running)
    run = running.kill_all()
    assert "there is room for 2 workers now" in run.stdout, run.output
    assert "saved by 1 workers, on 2" in run.stdout
    assert_same_so_far(run, start_dpa(lasting(recipe()), tmp_path / "alone" / "store", "run"), step)
