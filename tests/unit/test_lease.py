"""Can two processes be at work on the same run? One is refused while the other lives, and takes over when it does not."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpa_ray.store.fs import Store
from dpa_ray.store.lease import Lease, LeaseTaken, _boot, held, looks_held, wait

PATH = "runs/a/lease"
TTL_S = 1.0


def hold(store: Store, notes: list[str] | None = None, lost: Callable[[], None] = lambda: None):  # noqa: ANN201
    return held(store, PATH, report=(notes if notes is not None else []).append, lost=lost, lapses_after_s=TTL_S)


CHILD = """
import sys, time
from dpa_ray.store.fs import Store
from dpa_ray.store.lease import held
with held(Store(sys.argv[1]), "runs/a/lease", report=print, lost=lambda: None, lapses_after_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def child(store: Store) -> subprocess.Popen[str]:
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, store.uri, str(TTL_S)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_a_lease_that_was_given_back_is_free_at_once(store: Store) -> None:
    for _ in range(3):
        begun = time.monotonic()
        with hold(store):
            pass
        assert time.monotonic() - begun < TTL_S
    assert len(store.list(PATH)) == 1, "old numbers are removed"


def test_whoever_comes_while_the_holder_lives_is_refused_and_told_of_it(store: Store) -> None:
    other = child(store)
    try:
        notes: list[str] = []
        with pytest.raises(LeaseTaken, match=rf"process {other.pid} on .* is at work on this"), hold(store, notes):
            pass
        assert len(notes) == 1
    finally:
        other.kill()
        other.wait()


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(store: Store) -> None:
    other = child(store)
    other.kill()
    other.wait()
    begun = time.monotonic()
    with hold(store):
        assert time.monotonic() - begun < TTL_S / 2


def ended_pid() -> int:
    """The number of a process of this machine that is no more."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(ended.stdout)


@pytest.mark.parametrize(("host", "boot"), [("elsewhere", _boot()), (socket.gethostname(), "another")])
def test_the_lease_of_another_machine_lapses(store: Store, host: str, boot: str) -> None:
    """That its process's number is nobody's here says nothing of it; nor in another container, or after a reboot."""
    pid = ended_pid()
    foreign = {"number": 7, "host": host, "pid": pid, "boot": boot, "released": False, "nonce": "x"}
    store.write_json(f"{PATH}/7.json", foreign)
    notes: list[str] = []
    begun = time.monotonic()
    with hold(store, notes):
        assert time.monotonic() - begun >= TTL_S
        assert store.list(PATH) == ["8.json"]
    assert f"process {pid} on {host}" in notes[0]


def test_what_follows_by_itself_need_not_wait(store: Store) -> None:
    """A worker that takes the place of one on a node that is gone; another job's does wait."""
    foreign = b'{"number": 1, "host": "elsewhere", "pid": 1, "boot": "another", "owner": "job-a", "nonce": "x"}'
    store.write_bytes(f"{PATH}/1.json", foreign)
    begun = time.monotonic()
    options = {"report": lambda text: None, "lost": lambda: None, "lapses_after_s": TTL_S}
    with held(store, PATH, owner="job-a", **options):
        assert time.monotonic() - begun < TTL_S / 2
    store.delete(PATH)
    store.write_bytes(f"{PATH}/1.json", foreign)
    begun = time.monotonic()
    with held(store, PATH, owner="job-b", **options):
        assert time.monotonic() - begun >= TTL_S


def test_a_holder_asks_each_time_where_another_of_its_job_may_have_followed(store: Store) -> None:
    """That one did not have to wait for the lease to lapse."""
    lost = threading.Event()
    options = {"report": lambda text: None, "lapses_after_s": 1e6}  # nobody renews it while the test runs
    with held(store, PATH, owner="job-a", lost=lost.set, **options) as first:
        first.confirm()
        with held(store, PATH, owner="job-a", lost=lambda: None, **options) as second:
            with pytest.raises(LeaseTaken):
                first.confirm()
            assert lost.is_set()
            second.confirm()


class SlowWrites(Store):
    def write_bytes(self, path: str, data: bytes) -> None:
        super().write_bytes(path, data)
        time.sleep(TTL_S / 2)


def test_a_renewal_counts_from_its_beginning(store: Store) -> None:
    """Whoever saw what it wrote may take over before the answer was here."""
    store.write_bytes(f"{PATH}/1.json", b"{}")
    lease = Lease(store, PATH, 1, "", TTL_S / 2, lambda: None)
    lease.renew(SlowWrites(store.uri))
    store.write_bytes(f"{PATH}/2.json", b"{}")
    with pytest.raises(LeaseTaken):
        lease.confirm()


class Overtaken(Store):
    """Before this process writes its number, another one took it, gave it back, and a third took the next."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        super().write_bytes(f"{PATH}/2.json", b"{}")
        return super().put_if_absent(path, data)


def test_a_number_that_was_free_again_is_no_lease(store: Store) -> None:
    with pytest.raises(LeaseTaken), hold(Overtaken(store.uri)):
        pass


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": "x"}'])
def test_what_is_no_lease_lapses_too(store: Store, content: bytes) -> None:
    store.write_bytes(f"{PATH}/1.json", content)
    with hold(store):
        assert store.list(PATH) == ["2.json"]


def test_a_holder_whose_lease_was_taken_over_is_told(store: Store) -> None:
    lost = threading.Event()
    with hold(store, lost=lost.set):
        assert not lost.wait(TTL_S)
        store.write_bytes(f"{PATH}/2.json", b"{}")
        assert lost.wait(2 * TTL_S)
    assert store.read_bytes(f"{PATH}/2.json") == b"{}", "the other one's lease is left alone"


def test_a_holder_whose_lease_was_deleted_is_told_so(store: Store) -> None:
    lost = threading.Event()
    with hold(store, lost=lost.set) as lease:
        store.delete(PATH)
        assert lost.wait(2 * TTL_S)
        with pytest.raises(LeaseTaken, match=f"{PATH}: its file was deleted"):
            lease.confirm()


def test_of_many_at_once_one_gets_it(store: Store) -> None:
    got, refused = [], []
    release = threading.Event()

    def contend(number: int) -> None:
        try:
            with hold(store):
                got.append(number)
                release.wait(20)
        except LeaseTaken:
            refused.append(number)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while len(refused) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_who_waits_goes_on_when_the_holder_is_done_and_takes_no_lease(store: Store) -> None:
    notes: list[str] = []
    wait(store, PATH, until=lambda: False, report=notes.append, lapses_after_s=TTL_S)  # nobody holds it
    assert notes == []
    with hold(store):
        assert looks_held(store, PATH)
        holding, done = threading.Event(), threading.Event()

        def waits() -> None:
            wait(store, PATH, until=holding.is_set, report=notes.append, lapses_after_s=TTL_S)
            done.set()

        thread = threading.Thread(target=waits)
        thread.start()
        assert not done.wait(2 * TTL_S), "the holder lives"
    thread.join(30)
    assert done.is_set()
    assert len(notes) == 1, "told once"
    assert "is at work on it" in notes[0]
    assert not looks_held(store, PATH)
    with hold(store):
        pass


def test_who_waits_goes_on_when_what_it_waits_for_is_there(store: Store) -> None:
    with hold(store):
        wait(store, PATH, until=lambda: True, report=print, lapses_after_s=TTL_S)


def test_nobody_waits_for_a_process_that_was_killed(store: Store) -> None:
    other = child(store)
    other.kill()
    other.wait()
    assert not looks_held(store, PATH)
    wait(store, PATH, until=lambda: False, report=print, lapses_after_s=1e6)
