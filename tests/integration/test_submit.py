"""Does the main job behind `ray job submit`, on a cluster started by hand, do what it does locally?"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.runs import ENVIRONMENT, ROOT, STAGES, UNSET, Run, losses

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
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    head = subprocess.Popen(
        [RAY, "start", "--head", "--port", str(free_port()), "--dashboard-port", str(dashboard), "--num-cpus", "2",
         "--temp-dir", folder, "--block", "--disable-usage-stats"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment["RAY_API_SERVER_ADDRESS"] = address
    try:
        deadline = time.monotonic() + 120
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
    return subprocess.run(
        [RAY, "job", "submit", "--address", environment["RAY_API_SERVER_ADDRESS"], "--", *command],
        env=environment, cwd=ROOT, text=True, capture_output=True, timeout=500,
    )  # fmt: skip


def test_submitted_job_gives_the_local_runs_losses(cluster: dict[str, str], measured: Run, tmp_path: Path) -> None:
    recipe, store = tmp_path / "submitted.yaml", tmp_path / "store"
    recipe.write_text(yaml.safe_dump(measured.recipe))
    job = submit(cluster, sys.executable, "jobs/run_dpa.py", str(recipe), "--store", str(store), "--name", "submitted")
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
    run = Run(job.returncode, job.stdout, job.stderr, store, "submitted", measured.recipe)
    for stage in STAGES:
        # the same program on the same machine and one worker: the same numbers, to the last bit
        assert losses(run, stage) == losses(measured, stage)
    assert run.info()["status"] == "done"


def test_a_wrong_recipe_fails_the_job(cluster: dict[str, str], tmp_path: Path) -> None:
    job = submit(cluster, sys.executable, "jobs/run_dpa.py", "tiny", "sed=1", "--store", str(tmp_path / "store"))
    assert job.returncode == 1  # Ray's own: the job failed
    assert "sed: unknown key (did you mean seed?)" in job.stdout + job.stderr
    assert "Traceback" not in job.stdout
    assert not (tmp_path / "store").exists()


def test_without_the_token_nothing_is_run(cluster: dict[str, str], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    job = submit({**cluster, "RAY_AUTH_TOKEN": "another-" + "1" * 32}, "touch", str(marker))
    assert job.returncode != 0
    assert not marker.exists()
