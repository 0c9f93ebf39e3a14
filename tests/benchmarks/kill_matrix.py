"""What does each kind of fault cost a run, in each of its stages?

    pip install -e '.[test]' && python -m tests.benchmarks.kill_matrix --out matrix.json

A local Ray cluster of a head and two nodes with a worker each, running all the time (warm), and a real S3 server (rclone)
with the data, the images and the store. A fault is one run that meets it once in each stage, at a step chosen here. Each
run must end as one that nobody disturbed: the same samples in each step, and weights, losses and gradient norms to the last bit, or,
where it went on with fewer workers in between, losses to 1e-5; or end with the message that is promised, and then, by the
same command, as undisturbed. Recovery is the longest pause between two steps that are new, from the fault to the stage's end (after the
last step of a stage: the time to the next one's first, or to the end of the run).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests import image
from tests.benchmarks.random_kills import recipe, result
from tests.integration.runs import STAGES, Run, Running, start_dpa
from tests.s3 import S3, environment, free_port, fresh_bucket, rclone_process

NUM_STEPS = 60
FAULT_AT = 7
AUTH = {"RAY_AUTH_MODE": "disabled", **image.ray_settings()}
MARK = "DPA_TEST_MATRIX"
"""Variable that tells the cluster's processes from others of this machine."""


@dataclass
class Row:
    """One fault in one stage."""

    fault: str
    stage: str
    recovery_s: float | None
    ended: str  # what the run was like at its end


class Server:
    """rclone, to be stopped and started; its files lie in `folder`/data."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        (folder / "data").mkdir(parents=True)
        self.process = rclone_process(folder, self.port)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.process = rclone_process(self.folder, self.port)


@dataclass
class Bench:
    """What all runs share."""

    cluster: Cluster
    server: Server
    bucket: S3
    made: dict[str, Any]
    folder: Path
    nodes: list[Any] = field(default_factory=list)
    number: int = 0

    def add_nodes(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=2, env_vars=AUTH))

    def start(self, store: str, made: dict[str, Any]) -> Running:
        """The command; its Run looks at the server's files."""
        env = {"RAY_ADDRESS": self.cluster.address, **AUTH, **self.bucket.env}
        running = start_dpa(made, f"{self.bucket.uri}/{store}", "run", env=env, folder=self.folder / store)
        running.run = Run(0, "", "", self.server.folder / "data" / self.bucket.bucket / store, "run", made)
        return running


@dataclass
class Scene:
    """A run under way, and what may be done to it."""

    bench: Bench
    store: str
    made: dict[str, Any]
    running: Running

    def told(self, stage: str) -> int:
        """The last step of `stage` in metrics.jsonl."""
        file = self.running.run.folder / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
        except (FileNotFoundError, ValueError):  # not there yet, or being written
            return 0
        return max((line["step"] for line in lines if line["stage"] == stage), default=0)

    def wait_for(self, stage: str, step: int, timeout_s: float = 400) -> None:
        until = time.monotonic() + timeout_s
        while self.told(stage) < step:
            if self.running.process.poll() is not None:
                stdout, stderr = self.running.process.communicate()
                raise AssertionError(f"{stage} step {step} never came: {stdout[-4000:]}\n{stderr[-4000:]}")
            assert time.monotonic() < until, f"{stage}: step {step} did not come in {timeout_s} s"
            time.sleep(0.02)

    def longest_pause(self, stage: str, told: int, since: float) -> float:
        """Seconds between two new steps at most, from `since` (time.monotonic), after step `told`, to the stage's end: a node that is
        taken away has workers that go on for a while."""
        longest = 0.0
        while told < NUM_STEPS:
            self.wait_for(stage, told + 1)
            told, now = self.told(stage), time.monotonic()
            longest, since = max(longest, now - since), now
        return longest

    def workers(self) -> list[int]:
        return self.running.processes("ray::RayTrainWorker")

    def again(self) -> None:
        """The same command."""
        self.running = self.bench.start(self.store, self.made)


def processes(title: str) -> list[int]:
    """The cluster's with `title` in their command line: they have what this process was given (MARK)."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if title.encode() in (folder / "cmdline").read_bytes() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def worker_killed(scene: Scene, stage: str) -> None:
    os.kill(processes("ray::RayTrainWorker")[0], signal.SIGKILL)


def worker_killed_while_saving(scene: Scene, stage: str) -> None:
    """When a checkpoint has a file and no manifest."""
    root = scene.running.run.store / "checkpoints"
    pids = processes("ray::RayTrainWorker")
    for _ in range(200_000):
        for folder in root.glob(f"{stage.replace('_', '-')}-*/step-*"):
            if not (folder / "manifest.json").exists() and any(folder.glob("rank-*")):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                return
    raise AssertionError("no checkpoint was seen on its way")


def node_of_a_worker(bench: Bench) -> Any:
    """The raylet of a node is the parent of its workers."""
    parents = {psutil.Process(pid).ppid() for pid in processes("ray::RayTrainWorker")}
    return next(node for node in bench.nodes if node.all_processes["raylet"][0].process.pid in parents)


def node_removed(scene: Scene, stage: str) -> None:
    node = node_of_a_worker(scene.bench)
    scene.bench.nodes.remove(node)
    scene.bench.cluster.remove_node(node, allow_graceful=False)


def node_drained(scene: Scene, stage: str) -> None:
    node = node_of_a_worker(scene.bench)
    done = subprocess.run(
        ["ray", "drain-node", "--address", scene.bench.cluster.address, "--node-id", node.node_id, "--reason",
         "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "4"],
        capture_output=True, text=True, timeout=60, env={**os.environ, **AUTH},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    scene.bench.nodes.remove(node)


def driver_killed(scene: Scene, stage: str) -> None:
    os.kill(scene.running.process.pid, signal.SIGKILL)
    scene.running.process.communicate()
    scene.again()


def controller_killed(scene: Scene, stage: str) -> None:
    (pid,) = processes("ray::TrainController")
    os.kill(pid, signal.SIGKILL)


def store_away(scene: Scene, stage: str) -> None:
    scene.bench.server.stop()
    time.sleep(30)
    scene.bench.server.start()


def store_gone(scene: Scene, stage: str) -> None:
    scene.bench.server.stop()
    stdout, stderr = scene.running.process.communicate(timeout=400)
    assert scene.running.process.returncode == 1, stdout + stderr
    assert "Traceback" not in stderr, stderr
    assert "error: " in stderr, stderr
    print(f"    {stderr.strip().splitlines()[-1][:200]}", flush=True)
    scene.bench.server.start()
    scene.again()


@dataclass(frozen=True)
class Fault:
    do: Callable[[Scene, str], None]
    changes: dict[str, Any] = field(default_factory=dict)
    resizes: bool = False  # does the number of workers change on the way?
    at: int = FAULT_AT  # it comes when this step has been told


FAULTS = {
    "worker killed in a step": Fault(worker_killed),
    "workers killed while saving": Fault(worker_killed_while_saving),
    "node removed": Fault(node_removed, resizes=True),
    "node drained with notice": Fault(node_drained, resizes=True),
    "driver killed, submitted again": Fault(driver_killed),
    "controller killed": Fault(controller_killed),
    "S3 away for 30 s": Fault(store_away),
    "S3 gone, submitted again": Fault(store_gone, {"data": {"retry_s": 10}}),
    "worker killed as a stage ends": Fault(worker_killed, at=NUM_STEPS),
}


def suffer(bench: Bench, name: str, expected: dict[str, Any]) -> list[Row]:
    """One run that meets the fault in each stage."""
    fault, rows = FAULTS[name], []
    bench.number += 1
    made = json.loads(json.dumps(bench.made))
    made["data"] |= fault.changes.get("data", {})
    if fault.resizes:
        made["cluster"]["workers"] = {"min": 1, "max": 2}
    store = f"store-{bench.number}"
    scene = Scene(bench, store, made, bench.start(store, made))
    for stage, following in zip(STAGES, (*STAGES[1:], None), strict=True):
        bench.add_nodes()
        scene.wait_for(stage, fault.at)
        told, begun = scene.told(stage), time.monotonic()
        fault.do(scene, stage)
        if told < NUM_STEPS:
            rows.append(Row(name, stage, scene.longest_pause(stage, told, begun), ""))
            continue
        if following is not None:
            scene.wait_for(following, 1)
        else:
            scene.running.process.wait(400)
        rows.append(Row(name, stage, time.monotonic() - begun, ""))
    run = scene.running.finished(600)
    assert run.returncode == 0, run.output
    for row in rows:
        row.ended = compare(result(run), expected)
        print(f"  {name}, {row.stage}: {row.recovery_s:.1f} s, {row.ended}", flush=True)
    return rows


def compare(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """How alike two runs are. Raises: AssertionError where they are not."""
    if found == expected:
        return "to the bit"
    for stage in STAGES:
        for part, kind in ((1, "steps"), (4, "samples")):
            assert found[stage][part] == expected[stage][part], f"{stage}: other {kind}"
        assert found[stage][2] == pytest.approx(expected[stage][2], rel=1e-5), f"{stage}: other losses"
    return "losses to 1e-5"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="FAULT")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= AUTH | {MARK: uuid.uuid4().hex}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="dpa-matrix-") as temporary:
        folder = Path(temporary)
        made = recipe(folder / "assets")
        made["stages"]["proxy_llm"]["lora"]["dropout"] = 0.0  # other numbers on another number of workers
        made["cluster"] |= {"cpus_per_worker": 1.5, "workers": 2}
        for stage in STAGES:
            made["stages"][stage] |= {"epochs": 100, "max_steps": NUM_STEPS}
        server = Server(folder / "server")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            with fresh_bucket(environment(server.port), "matrix") as bucket:
                bench = Bench(cluster, server, bucket, made, folder)
                bench.add_nodes()
                whole = bench.start("whole", made)
                run = whole.finished(600)
                assert run.returncode == 0, run.output
                expected = result(run)
                print("undisturbed: done", flush=True)
                for name in options.faults:
                    rows += suffer(bench, name, expected)
        finally:
            cluster.shutdown()
            server.stop()
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def table(rows: list[Row]) -> str:
    lines = [f"{'fault':32}" + "".join(f"{stage:>12}" for stage in STAGES) + "   ended (seconds to the next new step)"]
    for name in dict.fromkeys(row.fault for row in rows):
        mine = {row.stage: row for row in rows if row.fault == name}
        cells = "".join(f"{mine[stage].recovery_s or 0:12.1f}" for stage in STAGES)
        lines.append(f"{name:32}{cells}   {next(iter(mine.values())).ended}")
    middle = statistics.median(row.recovery_s for row in rows if row.recovery_s is not None)
    lines.append(f"median {middle:.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
