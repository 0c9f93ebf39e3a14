"""Is a worker alive, and where is it? What it says of itself now and then, and what that means where nothing moves.

A collective that hangs tells nothing but that time is over. Which worker did not come is seen from where each one is: a
thread looks at the stack of the thread that trains, and so needs neither its help nor a word in its loop.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dpa_ray.engine.messages import Beat, LastBeat

PACKAGE = __name__.split(".")[0]
WAITING_IN = ("torch.distributed", "deepspeed.comm")
"""Modules in whose calls a worker waits for others."""
BARRIER = (f"{PACKAGE}.engine.protocol", "barrier")
"""And the one function of ours: module and name."""

BEATS = 10
"""So many signs of life come in the time after which a worker that gives none is given up."""
MOST_BETWEEN_S = 10.0

STILL_FRACTION = 0.5
"""Whoever has been at one place for this share of the limit did not just come there."""


@contextmanager
def beating(board: Any, rank: int, timeout_s: float) -> Iterator[None]:
    """In this block the calling thread's whereabouts go to `board` (a Board's handle, or None), often within `timeout_s`."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(board, rank, timeout_s, threading.get_ident(), ended), name="pulse", daemon=True
    )
    if board is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def _beat(board: Any, rank: int, timeout_s: float, thread: int, ended: threading.Event) -> None:
    process = f"process {os.getpid()} on {socket.gethostname()}"
    seen: tuple[object, ...] = ()
    since = time.monotonic()
    while not ended.wait(min(timeout_s / BEATS, MOST_BETWEEN_S)):
        frames = _stack(sys._current_frames().get(thread))
        now = time.monotonic()
        found = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        if found != seen:
            seen, since = found, now
        board.beat.remote(rank, Beat(process, place(frames), is_waiting(frames), in_collective(frames), now - since))


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def place(frames: list[FrameType]) -> str:
    """The innermost line of this package, e.g. `dpa_ray/engine/loop.py:140 (train)`."""
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] == PACKAGE and (module, frame.f_code.co_name) != BARRIER:
            return f"{module.replace('.', '/')}.py:{frame.f_lineno} ({frame.f_code.co_name})"
    return "outside of its task"


def is_waiting(frames: list[FrameType]) -> bool:
    """For other workers: in a collective, or at a barrier."""
    return in_collective(frames) or _at_barrier(frames)


def in_collective(frames: list[FrameType]) -> bool:
    """In a wait that has a limit? A barrier's own calls of torch have none."""
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    return not _at_barrier(frames) and any(name.startswith(WAITING_IN) for name in names)


def _at_barrier(frames: list[FrameType]) -> bool:
    return any((frame.f_globals.get("__name__", ""), frame.f_code.co_name) == BARRIER for frame in frames)


def waits_since(last: LastBeat) -> float:
    """How long the worker has waited for others, as far as it is known; 0 where it does not."""
    return last.beat.still_s if last.beat.waits else 0.0


def describe(beats: Mapping[int, LastBeat], silent: set[int]) -> str:
    """Which workers came, which did not, and where each one is; `silent`: those whose processes do not answer."""
    came, missing = [], []
    for rank, last in sorted(beats.items()):
        if last.beat.waits and rank not in silent:
            came.append(f"worker {rank} at {last.beat.place}")
        elif rank in silent:
            missing.append(
                f"worker {rank} ({last.beat.process}) does not answer; {last.silent_s:.0f} s ago it was at {last.beat.place}"
            )
        else:
            missing.append(
                f"worker {rank} ({last.beat.process}) is at {last.beat.place}, since {last.beat.still_s:.0f} s"
            )
    missing += [f"worker {rank} does not answer" for rank in sorted(silent - beats.keys())]
    if not missing:
        return f"all wait for each other ({', '.join(came)}): the network between them, most likely"
    waiting = f"{', '.join(came)} wait{'s' if len(came) == 1 else ''}" if came else "nobody waits"
    return f"{waiting}; {'; '.join(missing)}"


class Standstill:
    """Says once of each time in which workers wait for one that does not come: honest work is not ended, but told of."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.told = False

    def look(self, beats: Mapping[int, LastBeat]) -> str | None:
        """A line for people, where a worker has waited for longer than the limit; else None."""
        stands = any(waits_since(last) >= self.timeout_s for last in beats.values())
        is_news, self.told = stands and not self.told, stands
        return f"waiting for more than {self.timeout_s:g} s: {describe(beats, set())}" if is_news else None
