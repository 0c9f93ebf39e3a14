"""When is a failed call tried again? While S3 (or the hub) is away, up to `data.retry_s`; anything else fails at once."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.outages import told_by_arrow

FIRST_WAIT_S = 0.5
MAX_WAIT_S = 15.0
"""After an outage nobody waits longer than this for the next try."""
_ANSWERED = re.compile(r"An error occurred|HTTP status")
"""In what boto3 and Arrow say of a server that answers, with an error of its own."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


Report = Callable[[str], None]


class _Bridges:
    """The `bridging` blocks that this process is in, whose longest counts. They need not end in any order."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), list[tuple[float, Report | None]]()

    @property
    def retry_s(self) -> float:
        with self._lock:
            return max((retry_s for retry_s, _ in self._open), default=0.0)

    def begin(self, retry_s: float, report: Report | None) -> None:
        with self._lock:
            self._open.append((retry_s, report))

    def end(self, retry_s: float, report: Report | None) -> None:
        with self._lock:
            self._open.remove((retry_s, report))

    def tell(self, text: str) -> None:
        """To the log, and to everybody who wants to be told."""
        _log.warning("%s", text)
        with self._lock:
            reports = [report for _, report in self._open if report is not None]
        for report in reports:
            report(text)


_BRIDGES = _Bridges()


@contextmanager
def bridging(retry_s: float, report: Report | None = None) -> Iterator[None]:
    """In this block, every thread of this process waits up to `retry_s` for an S3 server that is away.

    Of the process, because sources read with threads of their own; other processes (Ray tasks) need their own block.
    `report` is told, from any thread, when an outage begins.
    """
    _BRIDGES.begin(retry_s, report)
    try:
        yield
    finally:
        _BRIDGES.end(retry_s, report)


def bridged_s() -> float:
    """Seconds that are waited for a server, now and in this process; 0 outside of `bridging`."""
    return _BRIDGES.retry_s


def is_outage(err: BaseException) -> bool:
    """Is `err`, as Arrow or the store raises it, about an S3 server that is away, not about the request or a local file?

    OSErrors with an errno are of local files or of a missing object.
    """
    if isinstance(err, NoAnswer):
        return True
    return isinstance(err, OSError) and err.errno is None and told_by_arrow(str(err))


def wait_s(num_tries: int, elapsed_s: float, retry_s: float, draw: float) -> float | None:
    """Seconds until the next try, after `num_tries` failed ones; None: give up.

    `elapsed_s` counts from the first failure and `draw` is uniform in [0, 1). The wait doubles up to MAX_WAIT_S, and is
    between half of that and all of it, so that a cluster's readers do not come back together. The last try is
    made when retry_s is over, not before: a shorter outage never ends a run.
    """
    if elapsed_s >= retry_s:
        return None
    longest = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(num_tries - 1, 30))
    return min(longest * (1 + draw) / 2, retry_s - elapsed_s)


class _Waiting:
    """How many calls of this process wait; an outage begins with the first and ends with the last."""

    def __init__(self) -> None:
        self._lock, self._num = threading.Lock(), 0

    def enter(self) -> bool:
        """Is this the first?"""
        with self._lock:
            self._num += 1
            return self._num == 1

    def leave(self) -> None:
        with self._lock:
            self._num -= 1


_WAITING = _Waiting()


def retried(
    call: Callable[[], _T],
    url: str,
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    draw: Callable[[], float] = random.random,
) -> _T:
    """What `call` returns; in a `bridging` block, tried again during an outage, which is logged once.

    Raises: UserError, naming `url`, where the outage lasts longer; whatever else `call` raises, at once.
    """
    try:
        return call()
    except (OSError, NoAnswer) as err:
        retry_s = bridged_s()
        if retry_s == 0 or not is_outage(err):
            raise
        reason = _reason(err, url)
    first, num_tries = now(), 1
    if _WAITING.enter():
        _BRIDGES.tell(f"{url}: {_server(url)} is away ({reason}); trying again for {retry_s:g} s (data.retry_s)")
    try:
        while (pause := wait_s(num_tries, now() - first, retry_s, draw())) is not None:
            sleep(pause)
            try:
                return call()
            except (OSError, NoAnswer) as err:
                if not is_outage(err):
                    raise
                reason, num_tries = _reason(err, url), num_tries + 1
    finally:
        _WAITING.leave()
    what, look = ("nothing but errors", "is well and has room") if _ANSWERED.search(reason) else ("no answer", "runs")
    raise UserError(
        f"{url}: {what} from {_server(url)} for {now() - first:.0f} s in {num_tries} tries ({reason}); see that the server {look} "
        f"and start again, or set data.retry_s to more than {retry_s:g}"
    )


def _server(url: str) -> str:
    if url.startswith("model"):  # no address: "model ORG/NAME", "model.llm ORG/NAME"
        return "the hub"
    return "Cloud Storage" if url.startswith("gs://") else "S3"


def _reason(err: BaseException, url: str) -> str:
    """Of Arrow's long message the end, which says it (Failed to connect to 10.0.0.1:80, for one); of the store's own what
    stands between the address and the advice, both of which are told anyway."""
    line = first_line(err)
    end = line.rpartition("; Details: ")[2]
    return end if end != line else line.removeprefix(f"{url}: ").partition("; check that")[0].partition("; set AWS_")[0]


def first_line(err: BaseException) -> str:
    """An error's message without what follows its first line."""
    return f"{err}".strip().split("\n")[0] or type(err).__name__
