"""Does the main job behind `ray job submit`, on a cluster started by hand, do what it does locally?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpa_ray.engine.prometheus import METRICS
from tests.integration.runs import ENVIRONMENT, ROOT, STAGES, UNSET, Run, changed, losses

pytestmark = pytest.mark.full

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """`ray start --head` with token authentication; gives the environment that reaches it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's socket paths must stay short
    address = f"http://127.0.0.1:{(dashboard := free_port())}"
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {
        **ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "only-for-this-test-" + "0" * 32,
        "RAY_metrics_report_interval_ms": "500",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    head = subprocess.Popen(
        [RAY, "start", "--head", "--port", str(free_port()), "--dashboard-port", str(dashboard), "--num-cpus", "2",
         "--metrics-export-port", str(metrics := free_port()),
         "--temp-dir", folder, "--block", "--disable-usage-stats"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment["RAY_API_SERVER_ADDRESS"] = address
    environment["METRICS_URL"] = f"http://127.0.0.1:{metrics}/metrics"
    try:
        deadline = time.monotonic() + 300
        while submit(environment, "true").returncode != 0:
            assert head.poll() is None, "the head is gone"
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(1)
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """By Ray's own client, from a checkout's root, as the README has it."""
    return subprocess.run(
        [RAY, "job", "submit", "--address", environment["RAY_API_SERVER_ADDRESS"], "--working-dir", ".", "--", *command],
        env=environment, cwd=ROOT, text=True, capture_output=True, timeout=500,
    )  # fmt: skip


def start(environment: dict[str, str], *command: str, id: str) -> subprocess.Popen[str]:
    """By jobs/submit.py."""
    return subprocess.Popen(
        [sys.executable, "jobs/submit.py", "--submission-id", id, "--", *command],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background processes ignore it, and theirs


def ray_job(environment: dict[str, str], verb: str, id: str) -> str:
    done = subprocess.run([RAY, "job", verb, id], env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(is_so: Callable[[], bool], what: str, timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


def scraped(environment: dict[str, str]) -> str:
    """What Prometheus would get of the head now."""
    with urllib.request.urlopen(environment["METRICS_URL"], timeout=10) as answer:
        return str(answer.read().decode())


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, if there is one."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1]) if lines else {}


def test_a_submitted_job_gives_the_local_runs_losses_and_shows_its_metrics(
    cluster: dict[str, str], measured: Run, tmp_path: Path
) -> None:
    recipe, store = tmp_path / "submitted.yaml", tmp_path / "store"
    recipe.write_text(yaml.safe_dump(measured.recipe))
    command = [sys.executable, "jobs/run_dpa.py", str(recipe), "--store", str(store), "--name", "submitted"]
    job = start(cluster, *command, id="submitted")
    wanted, found = (
        {metric.exported for metric in METRICS if not metric.name.startswith(("dpa_faults", "dpa_check"))},
        "",
    )
    seen: set[str] = set()
    while job.poll() is None and not wanted <= seen:
        found = scraped(cluster)
        seen |= {name for name in wanted if re.search(rf"^{name}(_total)?{{.*run=\"submitted\"", found, re.MULTILINE)}
        time.sleep(0.3)
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stdout[-4000:] + stderr[-4000:]
    assert seen == wanted, sorted(wanted - seen)
    assert not re.search(r"^ray_dpa_\w+_total_total", found, re.MULTILINE)
    run = Run(job.returncode, stdout, stderr, store, "submitted", measured.recipe)
    for stage in STAGES:
        # the same program on the same machine and one worker: the same numbers, to the last bit
        assert losses(run, stage) == losses(measured, stage)
    assert run.info()["status"] == "done"
    assert "`ray job stop submitted` stops it" in stdout
    assert job_info(cluster, "submitted")["metadata"] == {
        "run": "submitted", "method": "dpa", "recipe": "submitted.yaml",
    } | {k: v for k, v in job_info(cluster, "submitted")["metadata"].items() if k.startswith("job_")}  # fmt: skip
    (attempt,) = (run.folder / "logs").iterdir()
    logs = {file.name: file.read_text() for file in attempt.rglob("*") if file.is_file()}
    assert "proxy_mllm is finished" in logs["driver.log"]
    assert "dpa_ray: submitted" in logs["job-driver-submitted.log"]
    assert [name for name in logs if name.startswith("worker-")]
    assert not [name for name, text in logs.items() if cluster["RAY_AUTH_TOKEN"] in text]


def job_info(environment: dict[str, str], id: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{id}",
        headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return dict(json.load(answer))


def test_a_wrong_recipe_fails_the_job(cluster: dict[str, str], tmp_path: Path) -> None:
    job = submit(cluster, sys.executable, "jobs/run_dpa.py", "tiny", "sed=1", "--store", str(tmp_path / "store"))
    assert job.returncode == 1  # Ray's own: the job failed
    assert "sed: unknown key (did you mean seed?)" in job.stdout + job.stderr
    assert "Traceback" not in job.stdout
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_jobs_exit_code_is_the_clients(cluster: dict[str, str], code: int) -> None:
    job = start(cluster, sys.executable, "-c", f"print('said'); raise SystemExit({code})", id=f"exit-{code}")
    stdout, stderr = job.communicate(timeout=120)
    assert job.returncode == code, stdout + stderr
    assert "said" in stdout


def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_stop_it(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    job = start(cluster, "sh", "-c", f"touch {marker}; sleep 600", id="left-alone")
    until(marker.exists, "the job began")
    job.send_signal(signal.SIGINT)
    stdout, stderr = job.communicate(timeout=60)
    assert job.returncode == 130, stdout + stderr
    assert "job left-alone goes on" in stderr
    assert f"ray job stop --address {cluster['RAY_API_SERVER_ADDRESS']} left-alone" in stderr
    assert "Traceback" not in stderr
    assert "RUNNING" in ray_job(cluster, "status", "left-alone")
    ray_job(cluster, "stop", "left-alone")


def test_a_job_that_is_stopped_ends_tidily_and_not_with_0(
    cluster: dict[str, str], measured: Run, tmp_path: Path
) -> None:
    lasting = changed(
        measured.recipe,
        stages__proxy_llm__epochs=100_000,
        stages__proxy_llm__max_steps=100_000,
        checkpoint={"every_steps": 5},
    )
    recipe, store = tmp_path / "stopped.yaml", tmp_path / "store"
    recipe.write_text(yaml.safe_dump(lasting))
    command = [sys.executable, "jobs/run_dpa.py", str(recipe), "--store", str(store), "--name", "stopped"]
    job = start(cluster, *command, id="stopped")
    until(lambda: last_metrics(store / "runs/stopped").get("step", 0) >= 10 or job.poll() is not None, "it trains")
    begun = time.monotonic()
    ray_job(cluster, "stop", "stopped")
    stdout, stderr = job.communicate(timeout=120)
    print(f"stopped within {time.monotonic() - begun:.1f} s", file=sys.stderr)
    assert job.returncode == 3, stdout + stderr
    assert "interrupted: finished stages and checkpoints are kept" in stdout
    run = Run(job.returncode, stdout, stderr, store, "stopped", lasting)
    assert (run.info()["status"], run.info()["error"]) == ("stopped", "ended by SIGTERM")
    assert list(store.glob("checkpoints/proxy-llm-*/step-*/manifest.json"))
    until(lambda: not workers(), "the workers are gone", 60)
    (lease,) = (run.folder / "lease").glob("*.json")
    assert json.loads(lease.read_text())["released"], "the same job can be submitted again at once"


def workers() -> list[str]:
    """Training workers on this machine; one cluster at a time runs here."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"ray::RayTrainWorker" in file.read_bytes():
                found.append(file.parent.name)
    return found


def test_without_the_token_nothing_is_run(cluster: dict[str, str], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    stranger = {**cluster, "RAY_AUTH_TOKEN": "another-" + "1" * 32}
    job = submit(stranger, "touch", str(marker))
    assert job.returncode != 0
    ours = start(stranger, "touch", str(marker), id="stranger")
    _, stderr = ours.communicate(timeout=120)
    assert ours.returncode == 1
    assert "RAY_AUTH_TOKEN" in stderr
    assert "Traceback" not in stderr
    assert not marker.exists()
