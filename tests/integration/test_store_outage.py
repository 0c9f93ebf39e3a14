"""What becomes of a whole run whose S3 server goes away in the middle of a stage: for a while, and for good?"""

# ruff: noqa: F811 (fixtures of another module)
from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import s3
from tests.integration.runs import STAGES, Run, Running, losses, start_dpa
from tests.integration.test_survival import EVERY_STEPS, NUM_STEPS, recipe, weights, whole  # noqa: F401 (fixtures)
from tests.unit.test_outages import Server

BUCKET = "outage"
AWAY_S = 20.0

pytestmark = pytest.mark.ci


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "rclone")
    (server.folder / "data" / BUCKET).mkdir()
    yield server
    server.close()


TOKEN = "hf_token-to-be-kept-secret"


def start(server: Server, made: dict[str, Any], folder: Path, **more: str) -> Running:
    environment = s3.environment(server.port) | more
    return start_dpa(made, f"s3://{BUCKET}/store", "run", env=environment, folder=folder)


def files(server: Server) -> Path:
    """Of the store, as the server keeps them."""
    return server.folder / "data" / BUCKET / "store"


def wait_for_checkpoint(running: Running, server: Server, stage: str, step: int, timeout_s: float = 200) -> None:
    until = time.monotonic() + timeout_s
    while running.process.poll() is None and time.monotonic() < until:
        if list(files(server).glob(f"checkpoints/{stage}-*/step-{step:08d}-*/manifest.json")):
            return
        time.sleep(0.02)
    running.kill_all()
    raise AssertionError(f"no checkpoint of {stage} in {timeout_s} s")


def copied(server: Server, run: Run, folder: Path) -> Run:
    """The run with its store as a local folder."""
    shutil.copytree(files(server), folder)
    return Run(run.returncode, run.stdout, run.stderr, folder, run.name, run.recipe)


def assert_no_secret(secrets: Sequence[str], texts: Sequence[str], *folders: Path) -> None:
    """Neither in what was printed nor in any file: of the store, of Ray's session and logs."""
    read = [(str(p), p.read_bytes()) for f in folders for p in f.rglob("*") if p.is_file() and not p.is_symlink()]
    assert any("/logs/" in name for name, _ in read), "Ray's logs are among them"
    found = {name for name, content in read for secret in secrets if secret.encode() in content}
    assert not found
    assert not [secret for secret in secrets for text in texts if secret in text]


def assert_same(run: Run, expected: Run) -> None:
    for stage in STAGES:
        assert [line["step"] for line in run.metrics(stage)] == [line["step"] for line in expected.metrics(stage)]
        assert losses(run, stage) == losses(expected, stage), stage
        assert run.samples(stage) == expected.samples(stage), stage
    assert weights(run) == weights(expected)


def test_a_server_that_is_away_for_a_while_only_delays_the_run(
    server: Server,
    tmp_path: Path,
    recipe: Callable[..., dict[str, Any]],
    whole: Callable[..., Run],
) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:  # a short path: Ray makes sockets in it
        run = run_through_an_outage(server, recipe(), tmp_path, Path(ray_folder))
    assert_same(run, whole())


def run_through_an_outage(server: Server, made: dict[str, Any], tmp_path: Path, ray_folder: Path) -> Run:
    running = start(server, made, tmp_path, RAY_TMPDIR=str(ray_folder), HF_TOKEN=TOKEN)
    wait_for_checkpoint(running, server, "proxy-mllm", 4)
    server.away(AWAY_S)
    run = running.finished()
    assert run.returncode == 0, run.output
    assert "S3 is away" in run.stdout, run.output
    assert_no_secret([s3.SECRET, TOKEN], [run.stdout, run.stderr], files(server), ray_folder)
    run = copied(server, run, tmp_path / "copy")
    assert run.info()["timings"]["proxy_mllm"]["resumed_from"] == [], "no worker died of it"
    assert not list(files(server).glob("checkpoints/*/*/*.safetensors"))
    return run


def test_a_server_that_stays_away_ends_the_run_with_one_message_and_the_same_command_goes_on(
    server: Server,
    tmp_path: Path,
    recipe: Callable[..., dict[str, Any]],
    whole: Callable[..., Run],
) -> None:
    made = recipe(data__retry_s=1)
    running = start(server, made, tmp_path)
    wait_for_checkpoint(
        running, server, "proxy-mllm", NUM_STEPS - EVERY_STEPS
    )  # each later one waits for S3, then gives up
    server.kill()
    run = running.finished(120)
    assert run.returncode == 1, run.output
    assert "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert f"s3://{BUCKET}/store/" in line
    assert "no answer from S3" in line
    assert "data.retry_s" in line
    saved = list(files(server).glob("checkpoints/proxy-mllm-*/step-*/manifest.json"))
    assert saved, "what was saved is kept"
    server.start()
    run = copied(server, start(server, made, tmp_path).finished(), tmp_path / "copy")
    assert run.returncode == 0, run.output
    assert run.info()["timings"]["proxy_mllm"]["resumed_from"], json.dumps(run.info()["timings"])
    assert_same(run, whole())
