"""Does a store on Cloud Storage hold to its conditions, tell what is wrong, and is data read from there as from a disk?"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from dpa_ray.data.catalog import open_source, source_digest
from dpa_ray.data.prepare import prepare
from dpa_ray.data.retry import bridging, retried
from dpa_ray.errors import NoAnswer, Unreachable, UserError
from dpa_ray.outages import told_by_arrow
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store, gcs, lease, probe
from tests.gcs import Gcs
from tests.s3 import free_port
from tests.tiny_models import make_captions


def test_of_several_writers_one_makes_the_file(fake_gcs: Gcs) -> None:
    store, barrier = Store(f"{fake_gcs.uri}/p"), threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait(10)
        return store.put_if_absent("lease", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(write, range(8)))
    assert sum(made) == 1
    assert store.read_bytes("lease") == str(made.index(True)).encode()
    assert store.honours_conditions("lease")


def test_nothing_is_at_risk_in_it_and_a_lease_is_held_by_one(fake_gcs: Gcs) -> None:
    store = Store(f"{fake_gcs.uri}/p")
    assert probe.check(store) == []
    assert store.list("") == [], "nothing stays"
    with lease.held(store, "runs/a/lease", report=lambda text: None, lost=lambda: None):
        assert lease.looks_held(store, "runs/a/lease")
    assert not lease.looks_held(store, "runs/a/lease")


def test_a_long_upload_arrives_whole_and_is_read_by_parts(
    fake_gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PART_BYTES", 100_000)
    monkeypatch.setattr(gcs, "UPLOAD_BYTES", 256 << 10)
    data = os.urandom(3 * (256 << 10) + 7)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "long").write_bytes(data)
    store = Store(fake_gcs.uri)
    store.upload(tmp_path / "source", "x")
    store.download("x", tmp_path / "target")
    assert (tmp_path / "target" / "long").read_bytes() == data
    assert store.digest("x/long") == (len(data), hashlib.sha256(data).hexdigest())


def test_a_listing_of_many_pages_is_whole(fake_gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "NAMES_AT_ONCE", 3)
    store = Store(fake_gcs.uri)
    names = [f"{i:04d}" for i in range(10)]
    for name in names:
        store.write_bytes(f"many/{name}", b"")
        store.write_bytes(f"{name}/x", b"")
    assert store.list("many") == names
    assert store.list_dirs("") == [*names, "many"]
    store.delete("many")
    assert store.list("many") == []


def samples(section: SourceSection) -> list[Any]:
    source = open_source(section)
    return [sample for part in source.scan().parts for _, sample in source.read(part)]


def test_the_same_source_has_the_same_digest_and_samples(
    fake_gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = make_captions(tmp_path / "local", 6)
    store = Store(f"{fake_gcs.uri}/set")
    store.write_bytes(captions.file.name, captions.file.read_bytes())
    store.upload(captions.images, "images")
    local = SourceSection(source=str(captions.file), images=str(captions.images))
    remote = SourceSection(source=f"{fake_gcs.uri}/set/{captions.file.name}", images=f"{fake_gcs.uri}/set/images")
    for list_from in (64, 1):  # asked for one by one, and listed
        monkeypatch.setattr("dpa_ray.data.files._LIST_FROM", list_from)
        assert source_digest(remote) == source_digest(local)
    assert samples(remote) == samples(local)
    assert len(samples(remote)) == 6
    prepared = prepare(Store(f"{fake_gcs.uri}/store"), remote, max_quarantined_fraction=0)
    assert prepared == prepare(Store(str(tmp_path / "store")), local, max_quarantined_fraction=0)


def test_parquet_by_a_pattern_is_read_from_it(fake_gcs: Gcs, tmp_path: Path) -> None:
    rows = pa.table({"text": [f"caption {i}" for i in range(5)]})
    pq.write_table(rows, tmp_path / "a-0.parquet")
    Store(fake_gcs.uri).upload(tmp_path, "in", ["a-0.parquet"])
    local = SourceSection(source=str(tmp_path / "a-*.parquet"))
    remote = SourceSection(source=f"{fake_gcs.uri}/in/a-*.parquet")
    assert source_digest(remote) == source_digest(local)
    assert samples(remote) == samples(local)
    with pytest.raises(UserError, match=f"expected a file or folder at {fake_gcs.uri}/none.parquet, found nothing"):
        source_digest(SourceSection(source=f"{fake_gcs.uri}/none.parquet"))


# -- what is wrong


def test_a_missing_bucket_is_told_and_a_missing_object_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are Google's: the name of a bucket may have the word in it."""
    with answering([404], [], "The specified bucket does not exist.") as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        store = Store("gs://bucket-of-mine").brief()
        for call in (store.check, lambda: store.exists("x"), lambda: store.delete("x"), lambda: store.list("")):
            with pytest.raises(UserError, match="there is no bucket 'bucket-of-mine' at http.*create it"):
                call()
    with answering([404], [], "No such object: bucket-of-mine/x") as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        assert not Store("gs://bucket-of-mine").exists("x")
        with pytest.raises(FileNotFoundError, match="no such file"):
            Store("gs://bucket-of-mine").read_bytes("x")


def test_a_server_that_is_away_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{free_port()}")
    store = Store("gs://bucket-of-mine/p")
    for call in (lambda: store.check(write=False), lambda: store.brief().read_bytes("x")):
        with pytest.raises(NoAnswer, match="gs://bucket-of-mine/p.*no answer from http://127.0.0.1.*'bucket-of-mine'"):
            call()


def test_a_machine_without_an_account_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(
        Unreachable, match="no usable account for Google Cloud Storage.*give this machine a service account"
    ):
        Store("gs://bucket-of-mine/p").brief().read_bytes("x")


@contextmanager
def answering(statuses: list[int], seen: list[str], text: str = "what it says") -> Iterator[str]:
    """A server that gives these statuses one after the other, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(f"{self.command} {self.path}")
            body = json.dumps({"error": {"message": text}}).encode()
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.05))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("statuses", "kind", "words"),
    [
        (
            [403],
            UserError,
            "refused access to bucket 'bucket-of-mine' .HTTP status 403: what it says, reading.; check that",
        ),
        ([404], FileNotFoundError, "no such file"),
        ([400], UserError, "HTTP status 400: what it says, reading"),
        ([503], NoAnswer, "HTTP status 503"),
    ],
)
def test_errors_of_the_server_are_told(
    statuses: list[int], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with answering(statuses, seen) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        with pytest.raises(kind, match=words):
            Store("gs://bucket-of-mine").brief().read_bytes("x")
    assert len(seen) == 1, "brief: one try"


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    with answering([503, 429, 200], seen) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        assert b"what it says" in Store("gs://bucket-of-mine").read_bytes("a b")
    assert seen == ["GET /storage/v1/b/bucket-of-mine/o/a%20b?alt=media"] * 3


@pytest.mark.parametrize(("is_own", "made"), [(True, True), (False, False)])
def test_a_write_whose_answer_was_lost_is_known_again(
    is_own: bool, made: bool, fake_gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try was carried out, its answer was an error, and the second meets what is there."""
    from dpa_ray.store import gcs_client

    real = gcs_client._session
    tries = []

    def flaky() -> Callable[..., Any]:
        def request(method: str, url: str, **options: Any) -> Any:
            if method == "POST":
                tries.append(url)
                if len(tries) == 1:
                    if is_own:
                        real()(method, url, **options)
                    else:
                        Store(fake_gcs.uri).write_bytes("x", b"another's")
                    raise requests.ConnectionError("cut off")
            return real()(method, url, **options)

        return request

    if not is_own:
        Store(fake_gcs.uri).write_bytes("x", b"another's")
        tries.append("its own try comes second")
    monkeypatch.setattr(gcs_client, "_session", flaky)
    assert Store(fake_gcs.uri).put_if_absent("x", b"mine") is made


def test_arrows_words_for_a_server_that_is_away_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_by_arrow("google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of ...")
    assert not told_by_arrow("google::cloud::Status(PERMISSION_DENIED: Permanent error")
    assert not told_by_arrow("google::cloud::Status(NOT_FOUND: Permanent error")


def test_an_outage_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with answering([503, 200], []) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        store = Store("gs://bucket-of-mine", through=retried, patience="brief")
        with bridging(30, told.append):
            assert b"what it says" in store.read_bytes("x")
    assert len(told) == 1
    assert told[0].startswith("gs://bucket-of-mine/x: Cloud Storage is away (")


@pytest.mark.parametrize("stuck", [False, True])
def test_an_upload_of_which_the_server_keeps_a_part_goes_on_from_there(
    stuck: bool, fake_gcs: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's may keep less of a piece than it was sent, of the last one too; the fake one keeps all, so it is sent less."""
    monkeypatch.setattr(gcs, "PART_BYTES", 100_000)
    monkeypatch.setattr(gcs, "UPLOAD_BYTES", 512 << 10)
    sent: list[str] = []
    whole_call = gcs.call

    def lossy(method: str, url: str, **values: Any) -> Any:
        span = (values.get("headers") or {}).get("Content-Range", "")
        if not span or len(sent) % 2:
            sent.extend([span] if span else [])
            return whole_call(method, url, **values)
        sent.append(span)
        start, size = int(span.split()[1].split("-")[0]), span.rpartition("/")[2]
        if stuck and start:
            return gcs.Answer(b"", {"Range": f"bytes=0-{start - 1}"}, 308)
        piece = values["body"][: 256 << 10]
        headers = {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{size}"}
        return whole_call(method, url, **{**values, "body": piece, "headers": headers})

    monkeypatch.setattr(gcs, "call", lossy)
    data = os.urandom(3 * (512 << 10) + 300_000)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "long").write_bytes(data)
    store = Store(fake_gcs.uri)
    if stuck:
        with pytest.raises(NoAnswer, match="none of those from .* on that were sent again"):
            store.upload(tmp_path / "source", "x")
        assert not store.exists("x/long")
        return
    store.upload(tmp_path / "source", "x")
    assert store.digest("x/long") == (len(data), hashlib.sha256(data).hexdigest())
    assert len(sent) > 4
