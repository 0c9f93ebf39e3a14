"""Does a store that fails lose nothing: waited for where that helps, told at once where it does not, never written twice over?"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.data import retry
from dpa_ray.data.retry import bridging, retried
from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.report.metrics import MetricsLog, read
from dpa_ray.store import Store, s3_client
from dpa_ray.store.lease import LeaseTaken
from tests.files import fill, python
from tests.s3 import S3, environment, fresh_bucket
from tests.s3_proxy import RETRY_S, Fault, Proxy, forget_clients
from tests.unit.test_checkpointing import Stage
from tests.unit.test_outages import Server


@pytest.fixture
def store(proxied: Store) -> Store:
    return proxied


def _upload(store: Store, tmp: Path) -> list[str]:
    fill(tmp / "up", big=100_000)
    store.upload(tmp / "up", "up")
    return store.list("up")


def _download(store: Store, tmp: Path) -> bytes:
    store.download("a", tmp / "down")
    return (tmp / "down" / "x").read_bytes()


def _write(store: Store, tmp: Path) -> bytes:
    store.write_bytes("a/y", b"new")
    return store.read_bytes("a/y")


def _delete(store: Store, tmp: Path) -> list[str]:
    store.delete("a")
    return store.list("a")


def _copy(store: Store, tmp: Path) -> bytes:
    store.copy("a/x", "b/x")
    return store.read_bytes("b/x")


CALLS: dict[str, tuple[Callable[[Store, Path], Any], Any, tuple[str, str]]] = {
    "exists": (lambda store, tmp: store.exists("a/x"), True, ("HEAD", "/a/x")),
    "absent": (lambda store, tmp: store.exists("a/none"), False, ("HEAD", "/a/none")),
    "read": (lambda store, tmp: store.read_bytes("a/x"), b"12", ("GET", "/a/x")),
    "list": (lambda store, tmp: store.list(""), ["a/x"], ("GET", "list-type")),
    "list_dirs": (lambda store, tmp: store.list_dirs(""), ["a"], ("GET", "list-type")),
    "write": (_write, b"new", ("PUT", "/a/y")),
    "put_if_absent": (lambda store, tmp: store.put_if_absent("a/z", b"mine"), True, ("PUT", "/a/z")),
    "put_if_present": (lambda store, tmp: store.put_if_absent("a/x", b"mine"), False, ("HEAD", "/a/x")),
    "upload": (_upload, ["big"], ("PUT", "/up/big")),
    "download": (_download, b"12", ("GET", "/a/x")),
    "delete": (_delete, [], ("DELETE", "/a/x")),
    "copy": (_copy, b"12", ("PUT", "/b/x")),
}
"""By name: what is called, what comes of it, and method and path of the request that fails."""
PASSING = {
    "503": Fault(503), "500": Fault(500), "429": Fault(429), "500 after the deed": Fault(500, done=True),
    "slow": Fault(delay_s=3), "cut": Fault(cut=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", [k if k in ("503", "cut") else pytest.param(k, marks=pytest.mark.ci) for k in PASSING])
def test_a_fault_that_passes_only_delays_every_call(kind: str, rclone_s3: S3, proxy: Proxy, tmp_path: Path) -> None:
    for name, (call, expected, (method, path)) in CALLS.items():
        store = Store(f"{rclone_s3.uri}/{name}", through=retried)
        with bridging(RETRY_S):
            store.write_bytes("a/x", b"12")
            proxy.fail(PASSING[kind], method, containing=path, times=1 if kind == "slow" else 2)
            assert call(store, tmp_path / name) == expected, name
        assert proxy.num_failed > 0, name
        proxy.heal()


REFUSED = {403: "refused access", 507: "no room left"}


@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal_is_told_at_once_with_address_operation_reason_and_remedy(
    status: int, store: Store, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fail(Fault(status))
    for name, doing in {"read": "reading", "list": "listing", "write": "writing", "delete": "deleting"}.items():
        with bridging(RETRY_S), pytest.raises(UserError) as caught:
            CALLS[name][0](store, tmp_path / name)
        text = str(caught.value)
        assert text.startswith(store.uri), text
        assert REFUSED[status] in text
        assert doing in text
        assert "; " in text, "what to do comes after it"
        assert not isinstance(caught.value, NoAnswer)
    assert not [r for r in caplog.records if r.name == retry.__name__], "nothing was waited for"


ODD_PAGES = [
    b"<html><body>Please sign in", b"", b"<ListBucketResult></ListBucketResult>", b"{}", bytes(range(256)), b"<" * 10_000,
    b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a '" + b"b" * 999 + b"'>]><x>&a;</x>",
    b"<ListBucketResult><Contents><Key>../../etc/passwd</Key></Contents></ListBucketResult>",
]  # fmt: skip


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.ci if i else [], id=str(i)) for i, page in enumerate(ODD_PAGES)]
)
def test_answers_that_are_none_of_s3s_are_a_result_or_a_message(
    page: bytes, store: Store, proxy: Proxy, tmp_path: Path
) -> None:
    """What a proxy that asks for a password answers, for one: with status 200."""
    proxy.fail(Fault(page=page))
    calls: list[Callable[[], Any]] = [
        lambda: store.read_json("a/x"), lambda: store.list("a"), lambda: store.list_dirs("a"), lambda: store.delete("a/x"),
        lambda: store.download("a", tmp_path / "down"), lambda: store.upload(tmp_path / "up", "up"),
        lambda: store.put_if_absent("a/z", b"mine"), lambda: store.copy("a/x", "b/x"), lambda: store.check(),
    ]  # fmt: skip
    fill(tmp_path / "up", big=1000)
    for call in calls:
        try:
            call()
        except (UserError, FileNotFoundError) as err:
            assert store.uri in str(err)
    assert not (tmp_path / "etc").exists()
    assert not list(tmp_path.rglob("passwd"))


@pytest.mark.ci
def test_an_outage_for_good_is_one_message_when_its_time_is_over(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    proxy.fail(Fault(503))
    for name in ("read", "write", "list", "upload", "download"):
        told: list[str] = []
        with bridging(0.3, told.append), pytest.raises(UserError) as caught:
            CALLS[name][0](store, tmp_path / name)
        text = str(caught.value)
        assert "nothing but errors from S3 for" in text
        assert text.startswith(store.uri)
        assert "data.retry_s" in text
        assert "\n" not in text
        assert len(told) == 1, "people are told when it begins"
        assert "S3 is away" in told[0]


def test_a_store_that_waits_is_one_after_pickling_too(store: Store, proxy: Proxy) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(store))
    proxy.fail(Fault(503), times=2)
    with bridging(RETRY_S):
        assert again.read_bytes("a/x") == b"12"


# -- who waits


def test_workers_wait_for_one_that_waits_for_the_store() -> None:
    from dpa_ray.recipe import load

    limits = {
        load("tiny", [f"data.retry_s={s}", "data.stall_timeout_s=50"]).collective_limit_s - s for s in (100, 5000)
    }
    assert limits == {load("tiny").cluster.collective_timeout_s}


def test_a_run_that_writes_its_end_asks_nobody_who_waits(tmp_path: Path) -> None:
    from dpa_ray.recipe import load
    from dpa_ray.stages.runs import Run

    waiting, other = Store(str(tmp_path), through=retried), Store(str(tmp_path))
    run, asked = Run(waiting, load("tiny", [f"store={tmp_path}"])), list[Store]()
    run.confirm = asked.append
    run.write("running")
    run.write("failed", other)
    assert asked[0] is waiting
    assert asked[1] is other


# -- metrics and checkpoints


def record(step: int) -> dict[str, Any]:
    return {"stage": "one", "step": step, "loss": 1.0}


def test_metrics_that_wait_for_s3_hold_up_no_step(store: Store, proxy: Proxy) -> None:
    log = MetricsLog(store, "runs/a")
    log.start("one")
    log.append(record(1))
    proxy.fail(Fault(503))
    with bridging(RETRY_S):
        flush = threading.Thread(target=log.flush)
        flush.start()
        for step in range(2, 10):
            log.append(record(step))
        assert flush.is_alive(), "it still waits"
        proxy.heal()
        flush.join()
        log.flush()
    assert [r["step"] for r in read(store, "runs/a")] == list(range(1, 10))


FULL_DISK = """
    import resource, sys
    from dpa_ray.report.metrics import MetricsLog, read
    from dpa_ray.store import Store
    store, notes = Store(sys.argv[1]), []
    log = MetricsLog(store, "runs/a", note=notes.append)
    log.start("one")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    for step in range(1, 21):
        log.append({"stage": "one", "step": step, "loss": 0.5})
    written = [r["step"] for r in read(store, "runs/a")]
    assert written == list(range(1, len(written) + 1)) and 0 < len(written) < 20, written
    assert store.read_bytes("runs/a/metrics.jsonl").endswith(b"}\\n"), "no half line"
    assert len(notes) == 1 and "File too large" in notes[0] and "training goes on" in notes[0], notes
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.append({"stage": "one", "step": 21, "loss": 0.5})
    log.flush()
    assert [r["step"] for r in read(store, "runs/a")] == list(range(1, 22))
"""


def test_metrics_that_find_no_room_are_written_when_there_is(tmp_path: Path) -> None:
    done = python(FULL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.ci
def test_a_server_whose_disk_is_full_is_told_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: rclone may not write files of more than 50,000 bytes any more, and answers 500."""
    monkeypatch.setitem(s3_client.LIMITS, "usual", (1, 1, 1))  # type: ignore[misc]
    server, unlimited = Server(tmp_path / "rclone"), resource.RLIM_INFINITY
    try:
        with fresh_bucket(environment(server.port), "rclone") as bucket, bridging(0.2):
            store = Store(f"{bucket.uri}/store", through=retried)
            store.write_bytes("a", b"old")
            resource.prlimit(server._process.pid, resource.RLIMIT_FSIZE, (50_000, unlimited))
            fill(tmp_path / "up", a=200_000)
            for write in (lambda: store.write_bytes("a", bytes(200_000)), lambda: store.upload(tmp_path / "up", "")):
                with pytest.raises(UserError, match="nothing but errors from S3 .* has room and start again"):
                    write()
            assert store.list("") == ["a"]
            assert store.read_bytes("a") == b"old"
            resource.prlimit(server._process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
            store.upload(tmp_path / "up", "")
            assert store.digest("a")[0] == 200_000
    finally:
        server.close()
        forget_clients()


FULL_SCRATCH = """
    import resource
    import torch
    from safetensors.torch import save_file
    from dpa_ray.engine.worker import scratch
    from dpa_ray.errors import UserError
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for write in (lambda f: save_file({"a": torch.zeros(9999)}, f / "a"), lambda f: (f / "a").write_bytes(bytes(9999))):
        try:
            with scratch() as folder:
                write(folder)
        except UserError as err:
            assert str(folder) in str(err) and "TMPDIR" in str(err) and "same command" in str(err), err
        else:
            raise AssertionError("written")
    try:
        with scratch() as folder:
            (folder / "none").read_bytes()
    except FileNotFoundError:
        print("others come through")
"""


@pytest.mark.ci  # seconds of imports
def test_a_full_local_disk_at_a_stages_end_is_told() -> None:
    done = python(FULL_SCRATCH)
    assert done.returncode == 0, done.stderr
    assert "others come through" in done.stdout


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(403), "refused access"),
        pytest.param(Fault(507), "no room left", marks=pytest.mark.ci),
        pytest.param(Fault(503), "errors from S3", marks=pytest.mark.ci),
    ],
)
def test_training_goes_on_while_checkpoints_cannot_be_saved(
    fault: Fault, reason: str, store: Store, proxy: Proxy, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2", "data.retry_s=0.2", store=store)
    proxy.fail(fault, "PUT")
    for step in (1, 2, 3):
        stage.step(step)
    (note,) = [note for note in stage.notes if "step 2 could not be written" in note]
    assert reason in note
    assert "training goes on" in note
    assert stage.whole() == []
    proxy.heal()
    for step in (4, 5):
        stage.step(step)
    stage.saver.close()
    stage.recorder.close()
    assert stage.whole() == [4]
    assert [r["step"] for r in read(store, "runs/a")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_waits_out_an_outage_and_is_whole(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2", store=store)
    proxy.fail(Fault(503), times=5)
    for step in (1, 2, 3):
        stage.step(step)
    stage.saver.close()
    assert stage.whole() == [2]
    assert not [note for note in stage.notes if "could not" in note]


def test_whoever_may_have_been_replaced_saves_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")

    def taken() -> None:
        raise LeaseTaken("another process has taken over")

    stage.saver.confirm = taken
    for step in (1, 2, 3):
        stage.step(step)
    assert stage.whole() == []
    assert any("taken over" in note for note in stage.notes)
