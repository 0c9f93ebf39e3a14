"""What passes between the driver and its workers: orders there, events back.

Imports nothing but Ray's own: the actor that takes the events, and Ray Train's controller (which is handed the orders on
their way), would spend seconds on importing torch and transformers before anything can begin.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

Event = tuple[str, dict[str, Any], float]
"""What happened, and when it was heard of: seconds by time.time, on the driver's machine."""

PROGRESS = ("saved", "blind_shard", "task_finished")
"""Kinds of events after which a run that fails does not begin where it began before."""

FAILED, STARTED = "failed", "workers_started"
"""The events that workers are gone and others are to come (with `why`: failure, preemption or resize), and that they are
there."""


@dataclass(frozen=True)
class Orders:
    """Everything that the workers of one run are told."""

    store_uri: str
    tasks: Any  # ObjectRef of a tuple of Task: read on the workers only
    board: Any  # actor handle of a Board, or None
    owner: str  # of the leases that these workers, and those that take their place, hold
    machine: str  # the driver's


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    made: int = 0  # how often something was made that a failure cannot take away
    trains: bool = False  # these workers have made a step of the stage under way, so that its state can be saved
    stage: str = ""  # of the last step that was told
    step: int = 0

    def __str__(self) -> str:
        return f"after step {self.step} of {self.stage}" if self.stage else "before the first step"


@dataclass(frozen=True)
class Beat:
    """A sign of life of one worker, as it says it."""

    process: str  # for people: its number and machine
    place: str  # where in the code it is
    waits: bool  # for other workers
    in_collective: bool  # which gives up after a time, as a barrier does not
    still_s: float  # how long it has been there


@dataclass(frozen=True)
class LastBeat:
    """The last sign of life of one worker, and how long ago it came."""

    beat: Beat
    silent_s: float


class Board:
    """Where workers put events and the driver takes them; lives with the driver."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.so_far = Progress()
        self.save_is_wanted = False
        self.beats: dict[int, tuple[Beat, float]] = {}  # by rank: with its time by time.monotonic

    def put(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append((kind, values, time.time()))
        if kind in PROGRESS:
            self.so_far = replace(self.so_far, made=self.so_far.made + 1)
            self.save_is_wanted = False
        if kind in ("task_started", "task_finished"):
            self.so_far = replace(self.so_far, trains=False)
        elif kind == "step":
            self.so_far = replace(self.so_far, trains=True, stage=values["stage"], step=values["step"])
        elif kind == STARTED:
            self.beats.clear()  # what was of the workers before them
            self.save_is_wanted, self.so_far = False, replace(self.so_far, trains=False)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def progress(self) -> Progress:
        return self.so_far

    def want_save(self) -> None:
        """Ask the workers for a checkpoint now."""
        self.save_is_wanted = True

    def save_wanted(self) -> bool:
        """Is a checkpoint asked for that did not come yet?"""
        return self.save_is_wanted

    def beat(self, rank: int, beat: Beat) -> None:
        self.beats[rank] = (beat, time.monotonic())

    def last_beats(self) -> dict[int, LastBeat]:
        """By rank."""
        now = time.monotonic()
        return {rank: LastBeat(beat, now - at) for rank, (beat, at) in sorted(self.beats.items())}
