"""Who may write under a path? One process at a time, as long as it says that it lives.

A lease is a chain of small files, <path>/1.json, 2.json, ...: the highest number counts. Its holder writes it anew every
few seconds; whoever takes over makes the next number, which a conditional write gives to one process alone. A holder
that was thought dead sees the higher number and stops; one that could not renew its lease in time (the store was away,
the process stood still) writes nothing before it has looked. Clocks of different machines are not compared: a lease
lapses when it was watched for its time and stayed the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpa_ray.errors import LeaseTaken, UserError
from dpa_ray.store.fs import Store

LAPSES_AFTER_S = 30.0
RENEWALS = 5
"""How often a lease is written anew in the time in which it would lapse."""
POLL_S = 0.5

_log = logging.getLogger(__name__)


class Lease:
    """A lease that this process holds, as far as it knows."""

    def __init__(
        self, store: Store, path: str, number: int, owner: str, lapses_after_s: float, lost: Callable[[], None]
    ):
        self.store, self.path, self.number, self.owner = store, path, number, owner
        self.lapses_after_s = lapses_after_s
        self._lost, self._taken, self._lock = lost, threading.Event(), threading.Lock()
        self._sure_since = time.monotonic()
        self.why = "another process has taken over"
        """Of one that is taken, for people."""

    @property
    def taken(self) -> bool:
        """Has another process taken over, as far as this one knows?"""
        return self._taken.is_set()

    def confirm(self, store: Store | None = None) -> None:
        """Returns where nobody else can have taken over by now; to be called before what only the holder may write.

        The store (`store`, where that is another one) is asked only where the lease was not renewed in time, or where a
        process of the same owner may have followed at once.
        Raises: LeaseTaken; UserError where the store cannot be asked.
        """
        if self.owner or self.taken or time.monotonic() - self._sure_since >= self.lapses_after_s:
            self.renew(store or self.store)

    def renew(self, store: Store) -> None:
        """Write the lease anew, through `store`. Raises: LeaseTaken; UserError where that cannot be done."""
        with self._lock:
            begun = time.monotonic()
            if self.taken or (found := _highest(store, self.path)) != self.number:
                if not self.taken:
                    if not found:  # nobody's: somebody else may be at work already
                        self.why = "its file was deleted; the same command goes on from what is left"
                    self._taken.set()
                    _log.error("%s: %s", store.url(self.path), self.why)
                    self._lost()
                raise LeaseTaken(f"{store.url(self.path)}: {self.why}")
            store.write_bytes(_file(self.path, self.number), _content(self.number, self.owner))
            self._sure_since = begun  # of this write somebody may have seen the beginning


@contextmanager
def held(
    store: Store,
    path: str,
    *,
    report: Callable[[str], None],
    lost: Callable[[], None],
    owner: str = "",
    lapses_after_s: float = LAPSES_AFTER_S,
) -> Iterator[Lease]:
    """Hold the lease at `path` in this block.

    Where another process holds it, it is watched until it lapses or is written anew, `lapses_after_s` at most.
    Args:
        report: is told once that there is something to wait for.
        lost: called, from a thread, when another process has taken over; it should end this one's work.
        owner: names what processes follow each other by themselves (the workers of one job): a lease of the same owner is
            free at once, wherever its process was.
    Raises: LeaseTaken where the other process lives.
    """
    number = _acquire(store, path, report, owner, lapses_after_s)
    lease, ended, brief = Lease(store, path, number, owner, lapses_after_s, lost), threading.Event(), store.brief()
    thread = threading.Thread(target=_renew, args=(lease, brief, ended), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        try:
            if not lease.taken and _highest(brief, path) == number:
                brief.write_bytes(_file(path, number), _content(number, owner, released=True))
        except UserError as err:  # it lapses by itself
            _log.warning("%s", err)


def looks_held(store: Store, path: str) -> bool:
    """Is there a holder that has not said that it is done? (It may be dead on another machine: `wait` finds out.)"""
    number = _highest(store, path)
    return bool(number) and not _is_free(_read(store, path, number), "")


def wait(
    store: Store,
    path: str,
    *,
    until: Callable[[], bool],
    report: Callable[[str], None],
    lapses_after_s: float = LAPSES_AFTER_S,
) -> None:
    """Wait while another process lives that holds the lease at `path`, or until `until()`. The lease is not taken.

    A holder that misses a renewal is waited for no longer: who then takes the lease finds out whether it has lapsed.
    `report` is told once that there is something to wait for.
    """
    seen: tuple[int, bytes] | None = None
    since, told = time.monotonic(), False
    while not until():
        number = _highest(store, path)
        content = _read(store, path, number) if number else b""
        if (number, content) != seen:
            seen, since = (number, content), time.monotonic()
        if not number or _is_free(content, "") or time.monotonic() - since >= 2 * lapses_after_s / RENEWALS:
            return
        if not told:
            told = True
            report(f"{_holder(content)} is at work on it; waiting for its result")
        time.sleep(min(POLL_S, lapses_after_s / RENEWALS))


def _acquire(store: Store, path: str, report: Callable[[str], None], owner: str, lapses_after_s: float) -> int:
    seen: tuple[int, bytes] | None = None
    since = time.monotonic()
    while True:
        number = _highest(store, path)
        content = _read(store, path, number) if number else b""
        if (number, content) != seen:
            if seen is not None and content and not _is_free(content, owner):
                raise LeaseTaken(
                    f"{store.url(path)}: {_holder(content)} is at work on this; wait for its end, or stop it"
                )
            seen, since = (number, content), time.monotonic()
            if number and not _is_free(content, owner):
                report(
                    f"{_holder(content)} was at work on this; waiting up to {lapses_after_s:g} s to see whether it lives"
                )
        if not number or _is_free(content, owner) or time.monotonic() - since >= lapses_after_s:
            if store.put_if_absent(_file(path, number + 1), _content(number + 1, owner)):
                if _highest(store, path) != number + 1:  # several hand-overs since we looked
                    continue
                for old in range(number, 0, -1):
                    if not store.exists(_file(path, old)):
                        break
                    store.delete(_file(path, old))
                return number + 1
            continue  # another one was faster: look at what it wrote
        time.sleep(min(POLL_S, lapses_after_s / RENEWALS))


def _renew(lease: Lease, store: Store, ended: threading.Event) -> None:
    """In a thread. `store` gives up soon: a call that outlasts the lease renews nothing."""
    away = False
    while not ended.wait(lease.lapses_after_s / RENEWALS):
        try:
            lease.renew(store)
            away = False
        except LeaseTaken:
            return
        except Exception as err:  # whatever it is: a holder that cannot say that it lives must say why, and try again
            if not away:
                _log.warning("%s: this lease cannot be renewed now: %s", store.url(lease.path), err)
            away = True


def _highest(store: Store, path: str) -> int:
    """The number that counts; 0 where there is none."""
    names = [re.fullmatch(r"([0-9]{1,18})\.json", name) for name in store.list(path, recursive=False)]
    return max((int(name[1]) for name in names if name), default=0)


def _file(path: str, number: int) -> str:
    return f"{path}/{number}.json"


def _read(store: Store, path: str, number: int) -> bytes:
    try:
        return store.read_bytes(_file(path, number))
    except FileNotFoundError:  # taken over at this moment
        return b""


def _content(number: int, owner: str, *, released: bool = False) -> bytes:
    """Different at every call: that is the sign of life."""
    values = {
        "number": number, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "owner": owner, "released": released,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "nonce": uuid.uuid4().hex,
    }  # fmt: skip
    return json.dumps(values).encode()


def _boot() -> str:
    """This start of this machine, and whose process numbers these are: containers count their own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _values(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_free(content: bytes, owner: str) -> bool:
    """Released, of `owner` itself, or of a process of this machine that is no more."""
    values = _values(content)
    if values.get("released") is True or (owner and values.get("owner") == owner):
        return True
    boot = _boot()
    if not boot or (values.get("boot"), values.get("host")) != (boot, socket.gethostname()):
        return False
    pid = values.get("pid")
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _holder(content: bytes) -> str:
    values = _values(content)
    return f"process {values.get('pid', '?')} on {values.get('host', '?')} (last heard of {values.get('written', '?')})"
