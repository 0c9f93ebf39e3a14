"""Does an S3 outage only delay, a long one end with its reason, and what lasts (absent, refused) not wait at all?"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dpa_ray.data import patience
from dpa_ray.data.files import Folder, chunks
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
from tests.s3 import S3, environment, free_port, fresh_bucket, rclone_process
from tests.unit.test_encode import encoder, style
from tests.unit.test_ingest import PROCESSOR
from tests.unit.test_sources import make, png, record, upload

OUTAGE_S = 2.0


class Server:
    """An rclone server that can be killed and started again, with one bucket."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.s3: S3

    def start(self) -> None:
        self.process = rclone_process(self.folder, self.port)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def outage(self) -> threading.Thread:
        """Kill it, and start it again after OUTAGE_S."""
        self.kill()
        thread = threading.Timer(OUTAGE_S, self.start)
        thread.start()
        return thread


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.3)
    (tmp_path / "s3" / "data").mkdir(parents=True)
    made = Server(tmp_path / "s3")
    made.start()
    with fresh_bucket(environment(made.port), "rclone") as made.s3:
        yield made
    made.kill()


@pytest.fixture
def section(server: Server, tmp_path: Path) -> SourceSection:
    make(tmp_path / "set", [record(i) for i in range(3)])
    upload(server.s3, tmp_path / "set", "in/")
    return SourceSection(source=f"{server.s3.uri}/in/set.json")


def seconds(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_an_outage_only_delays_images_and_records(server, section):
    back = server.outage()
    assert Folder(f"{server.s3.uri}/in", 60).read("im/1.png") == png(1)
    back.join()
    back = server.outage()
    assert b"".join(chunks(section.source, retry_s=60)).startswith(b'[{"id": "r0"')
    back.join()


def test_an_outage_only_delays_batches(server, section):
    store = Store(f"{server.s3.uri}/store")
    prepared = prepare(store, section, max_quarantined_fraction=0)
    loader = Loader(store, prepared, encoder(style("qwen2.5")[0]), PROCESSOR, 0, retry_s=60)
    back = server.outage()
    assert loader.load(np.arange(3), 0).ids == ["r0", "r1", "r2"]
    back.join()


def test_a_longer_outage_ends_with_the_url_and_the_key(server):
    server.kill()
    with pytest.raises(UserError, match=r"s3://.*/im/1.png: no answer .*data.retry_s=0.5 seconds.*raise data.retry_s"):
        Folder(server.s3.uri, 0.5).read("im/1.png")
    server.start()


def test_a_missing_object_is_not_waited_for(server, section):
    def read() -> None:
        with pytest.raises(FileNotFoundError):
            Folder(f"{server.s3.uri}/in", 600).read("im/none.png")

    assert seconds(read) < 5


def test_wrong_credentials_are_not_waited_for(server, section, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    from dpa_ray.data import files

    files._s3.cache_clear()

    def read() -> None:
        with pytest.raises(UserError, match="cannot be read"):
            Folder(f"{server.s3.uri}/in", 600).read("im/1.png")

    assert seconds(read) < 20
    files._s3.cache_clear()


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Couldn't connect"), True),
        (OSError("AWS Error SLOW_DOWN during GetObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
        (OSError("AWS Error SIGNATURE_DOES_NOT_MATCH during GetObject operation"), False),
        (FileNotFoundError(2, "Path does not exist"), False),
        (OSError(5, os.strerror(5)), False),
        (ValueError("x"), False),
    ],
)
def test_what_is_an_outage(error: Exception, outage: bool) -> None:
    assert patience.is_outage(error) is outage


def test_a_local_error_is_raised_at_once():
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        patience.patiently(fail, "/local/path", 600)
    assert len(calls) == 1
