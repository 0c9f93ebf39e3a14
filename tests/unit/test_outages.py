"""Does an outage of S3 shorter than data.retry_s only delay, whatever is read, and does everything else fail at once?"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpa_ray.data import files, llava, reading, retry, shards
from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.catalog import source_digest
from dpa_ray.data.files import Folder
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.data.prepared import Prepared
from dpa_ray.data.reading import chunks
from dpa_ray.data.retry import bridging
from dpa_ray.data.sizes import Sizes
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store, s3_client
from tests import s3
from tests.unit.test_ingest import equal, prepared_loader
from tests.unit.test_parquet import captions
from tests.unit.test_sources import make, png, record, upload
from tests.unit.test_webdataset import pairs, tar

NUM_ROWS = 60  # some read-aheads of THREADS


class Server:
    """rclone with one bucket, that can go away and come back, on one port and folder."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, s3.free_port()
        self._threads: list[threading.Timer] = []
        (folder / "data").mkdir(parents=True)
        self.start()

    def start(self) -> None:
        self._process: subprocess.Popen[bytes] = s3.rclone_process(self.folder, self.port)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def away(self, seconds: float = 0.5) -> None:
        """Kill it; it is back after `seconds`."""
        self.kill()
        self._later(seconds, self.start)

    def hang(self, seconds: float = 2) -> None:
        """Stop it, connections and all; it goes on after `seconds`."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # sent is not yet stopped
        self._later(seconds, lambda: self._process.send_signal(signal.SIGCONT))

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        thread = threading.Timer(seconds, do)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self.kill()


def forget_clients() -> None:
    for cached in (files._s3, s3_client._arrow_filesystem, s3_client._client):
        cached.cache_clear()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With clients that give up within a second, and short waits."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.1)
    server = Server(tmp_path / "rclone")
    for module, prefix in ((files, "_"), (s3_client, "ARROW_")):
        for name in ("CONNECT_S", "STALLED_S", "ATTEMPTS"):
            monkeypatch.setattr(module, prefix + name, 1)
    monkeypatch.setitem(s3_client.LIMITS, "usual", (1, 1, 1))
    forget_clients()
    with s3.fresh_bucket(s3.environment(server.port), "rclone") as server.s3:
        yield server
    server.close()
    forget_clients()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == retry.__name__]


# -- a source, prepared


def sources(folder: Path) -> None:
    """The same rows as LLaVA JSON, in two tars and in two Parquet files, and a file that mixes all."""
    make(folder, [record(i, image=f"im/{i}.png") for i in range(NUM_ROWS)])
    half = NUM_ROWS // 2
    for i in range(NUM_ROWS):
        (folder / "im" / f"{i}.png").write_bytes(png(i))
    for i in range(2):
        tar(folder / "tars" / f"s-{i}.tar", pairs(i * half, (i + 1) * half))
        captions(folder / "parquet" / f"{i}.parquet", i * half, (i + 1) * half, group_rows=3)
    (folder / "mix.yaml").write_text(
        "datasets: [{json_path: set.json}, {source: tars/s-*.tar}, {source: parquet, format: parquet, take: first:20}]"
    )


KINDS = {"llava": "set.json", "tar": "tars/s-*.tar", "parquet": "parquet", "mixture": "mix.yaml"}


def section(kind: str, root: str | Path) -> SourceSection:
    return SourceSection(source=f"{root}/{KINDS[kind]}", format="parquet" if kind == "parquet" else None)


def run(store: Store, source: SourceSection, **options: Any) -> Prepared:
    return prepare(store, source, max_quarantined_fraction=0, **{"retry_s": 60, **options})


def content(store: Store, prepared: Prepared) -> list[bytes]:
    names = [f"{prepared.shard_folder(i)}/{name}" for i, (name, _) in enumerate(prepared.shards)]
    return [store.read_bytes(name) for name in names]


def at_sample(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], None]) -> None:
    """Call `do` when so many samples of a source have been looked at."""
    parse, seen, lock = llava.parse, [], threading.Lock()

    def counted(value: Any) -> Any:
        with lock:
            seen.append(1)
            if len(seen) == number:
                do()
        return parse(value)

    monkeypatch.setattr(llava, "parse", counted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_prepared_to_the_same_bytes_through_outages(kind, server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dpa_ray.data.tar._WINDOW_BYTES", 500)  # so that reading goes on for as long as there are rows
    sources(tmp_path / "set")
    upload(server.s3, tmp_path / "set", "in/")
    store = Store(str(tmp_path / "store"))
    undisturbed = run(store, section(kind, tmp_path / "set"))
    there = Store(f"{server.s3.uri}/store")
    server.away()  # while it is listed and scanned
    at_sample(monkeypatch, 10, server.away)
    prepared = run(there, section(kind, f"{server.s3.uri}/in"))
    assert prepared == undisturbed
    assert content(there, prepared) == content(store, undisturbed)
    assert len(warnings(caplog)) == 2, "one an outage"
    for text in warnings(caplog):
        assert text.startswith(server.s3.uri)
        assert "(data.retry_s)" in text


def test_a_server_that_hangs_only_delays_a_source(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dpa_ray.data.tar._WINDOW_BYTES", 500)
    sources(tmp_path / "set")
    upload(server.s3, tmp_path / "set", "in/")
    at_sample(monkeypatch, 10, server.hang)
    found = run(Store(str(tmp_path / "store")), section("mixture", f"{server.s3.uri}/in"))
    assert found.digest == source_digest(section("mixture", tmp_path / "set"))
    assert len(warnings(caplog)) == 1


def test_a_store_that_is_away_only_delays_what_is_prepared(server, tmp_path, monkeypatch, caplog):
    sources(tmp_path / "set")
    at_sample(monkeypatch, NUM_ROWS, server.away)
    store = Store(f"{server.s3.uri}/store")
    prepared = run(store, section("llava", tmp_path / "set"))
    assert len(warnings(caplog)) == 1
    assert "/store/data/" in warnings(caplog)[0]
    assert prepared.num_rows == NUM_ROWS
    server.away()
    with bridging(60):
        assert BridgedStore(store).list(prepared.path) == [
            "manifest.json", "part-00000.parquet", "quarantine.jsonl", "sizes.uint8",
        ]  # fmt: skip


def test_an_outage_that_outlasts_retry_s_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr("dpa_ray.data.tar._WINDOW_BYTES", 500)
    sources(tmp_path / "set")
    upload(server.s3, tmp_path / "set", "in/")
    store = Store(str(tmp_path / "store"))
    server.kill()
    for kind, path in KINDS.items():
        with pytest.raises(
            UserError, match=rf"^s3://.*/{path.replace('*', '.')}: no answer from S3 for .*data.retry_s"
        ):
            run(store, section(kind, f"{server.s3.uri}/in"), retry_s=0.1)
    read = {"llava": r"im/\d+.png", "tar": r"tars/s-\d.tar", "parquet": r"parquet/\d.parquet"}
    for kind, path in read.items():
        server.start()
        at_sample(monkeypatch, 10, server.kill)
        with pytest.raises(
            UserError, match=rf"^s3://.*/in/{path}: no answer .*see that the server runs and start again"
        ):
            run(store, section(kind, f"{server.s3.uri}/in"), retry_s=0.1)
        assert server._process.poll() is not None


# -- one file


def test_a_file_goes_on_where_it_was(server, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 100_000)
    data = np.random.default_rng(0).bytes(450_000)
    path = server.folder / "data" / server.s3.bucket / "large"
    path.write_bytes(data)
    with bridging(60):
        parts = chunks(f"{server.s3.uri}/large", 1000)
        found = [next(parts), next(parts)]
        server.away()
        found += parts
        assert b"".join(found) == data[1000:]
        assert len(found) == 5


@pytest.mark.parametrize(
    ("change", "message"), [(bytes(440_000), "450000 bytes, found 440000"), (b"1" * 450_000, "ETag b'.*', found b'.*'")]
)
def test_a_file_that_is_another_after_the_outage_is_told(change, message, server, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 100_000)
    path = server.folder / "data" / server.s3.bucket / "large"
    path.write_bytes(bytes(450_000))
    with bridging(60):
        parts = chunks(f"{server.s3.uri}/large")
        next(parts)
        server.away()
        path.write_bytes(change)
        with pytest.raises(UserError, match=f"large: expected {message}: it changed while it was read; start again"):
            list(parts)


def test_a_folder_of_images_is_looked_at_through_an_outage(server, tmp_path, monkeypatch):
    make(tmp_path / "set", [record(0)])
    upload(server.s3, tmp_path / "set", "in/")
    folder = Folder(f"{server.s3.uri}/in")
    names = [f"im/{i}.png" for i in range(3)] + ["im/none.png"]
    expected = {name: len(png(i)) for i, name in enumerate(names[:3])} | {"im/none.png": files.MISSING}
    with bridging(60):
        server.away()
        folder.check()
        for list_from in (64, 1):  # asked for one by one, and listed
            monkeypatch.setattr(files, "_LIST_FROM", list_from)
            server.away()
            assert folder.sizes(names) == expected


# -- shards


@pytest.fixture
def loader(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """24 samples in two shards, of three row groups each, of which it keeps one."""
    monkeypatch.setattr(shards, "MAX_GROUP_ROWS", 4)
    monkeypatch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 12)
    made = prepared_loader(tmp_path, [record(i) for i in range(24)], store=Store(f"{server.s3.uri}/store"))
    made.cache_bytes, made.retry_s = 1, 60
    return made


BATCHES = [np.arange(start, start + 4) for start in range(0, 24, 4)]


@pytest.mark.parametrize("outage", ["away", "hang"])
def test_a_loader_goes_on_with_the_same_batches(loader, server, outage, caplog):
    expected = [loader.load(rows, 0) for rows in BATCHES]
    loader = pickle.loads(pickle.dumps(loader))  # as it comes to a data task
    found = [loader.load(rows, 0) for rows in BATCHES[:2]]  # its first shard is open
    getattr(server, outage)()
    found += [loader.load(rows, 0) for rows in BATCHES[2:]]
    assert all(equal(one, two) for one, two in zip(expected, found, strict=True))
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("in_footers", [False, True])
def test_sizes_are_read_through_an_outage(loader, server, in_footers):
    rows = np.arange(24)
    prepared = replace(loader.prepared, sizes=()) if in_footers else loader.prepared
    expected = Sizes(loader.store, prepared)(rows)
    server.away()
    assert (Sizes(loader.store, prepared, retry_s=60)(rows) == expected).all()


def test_shards_that_stay_away_are_told(loader, server):
    loader.retry_s = 0.5
    loader.load(BATCHES[0], 0)
    server.kill()
    footers = replace(loader.prepared, sizes=())
    for name, call in (
        ("part-00000.parquet", lambda: loader.load(BATCHES[1], 0)),
        ("part-00000.parquet", lambda: Sizes(loader.store, footers, retry_s=0.5)(BATCHES[0])),
        ("sizes.uint8", lambda: Sizes(loader.store, loader.prepared, retry_s=0.5)(BATCHES[0])),
    ):
        match = rf"^s3://.*/{name}: no answer from S3 .*set data.retry_s to more than 0.5$"
        with pytest.raises(UserError, match=match) as caught:
            call()
        assert "prepared again" not in str(caught.value), "nothing is wrong with the data"


@pytest.mark.ci  # Ray, which must start with this server's environment, takes 15 s
def test_prepare_tasks_of_ray_wait_too(server, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr("dpa_ray.data.prepare.IN_PROCESS_ROWS", 0)
    monkeypatch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 10)
    sources(tmp_path / "set")
    upload(server.s3, tmp_path / "set", "in/")
    store = Store(f"{server.s3.uri}/store")

    def report(line: str) -> None:
        if "10 of 60 samples" in line:
            server.away(3)  # longer than a task's client tries by itself

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        prepared = run(store, section("llava", f"{server.s3.uri}/in"), report=report)
        assert prepared.num_rows == NUM_ROWS
    finally:
        ray.shutdown()


# -- what is no outage


@pytest.fixture
def at_once(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing was waited for."""
    start = time.monotonic()
    with bridging(600):
        yield
    assert time.monotonic() - start < 20
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_object_or_bucket_fails_at_once(kind, server, at_once):
    for root in (f"{server.s3.uri}/none", "s3://no-such-bucket/in"):
        with pytest.raises(UserError, match=f"{root}"):
            source_digest(section(kind, root))
    with pytest.raises(FileNotFoundError):
        Folder(f"{server.s3.uri}/im").read("none.png")


def test_wrong_credentials_or_a_wrong_scheme_fail_at_once(loader, server, monkeypatch, at_once):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    for kind in KINDS:
        with pytest.raises(UserError, match=r"^s3://.* cannot be read: .*ACCESS_DENIED"):
            source_digest(section(kind, f"{server.s3.uri}/in"))
    with pytest.raises(UserError, match=r"part-00000.parquet cannot be read: .*ACCESS_DENIED") as caught:
        loader.load(BATCHES[0], 0)
    assert "delete" not in str(caught.value), "nothing is wrong with the data"
    with pytest.raises(UserError, match="refused access"):
        BridgedStore(loader.store).exists("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
    loader._reader = None
    with pytest.raises(UserError, match="cannot be read: .*SSL connect error"):
        loader.load(BATCHES[0], 0)
    with pytest.raises(UserError, match="SSLError"):
        BridgedStore(loader.store).exists("a")


def test_a_missing_or_damaged_shard_fails_at_once(loader, server, at_once):
    folder = server.folder / "data" / server.s3.bucket / "store" / loader.prepared.path
    path = folder / "part-00000.parquet"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"part-00000.parquet: row group 0 cannot be read: .*; delete"):
        loader.load(BATCHES[0], 0)
    (folder / "part-00001.parquet").unlink()
    server.kill()
    server.start()  # rclone remembers what it listed
    with pytest.raises(UserError, match=r"part-00001.parquet: expected \d+ bytes, found no file; delete"):
        loader.load(BATCHES[-1], 0)
