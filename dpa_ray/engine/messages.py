"""What passes between the driver and its workers: orders there, events back.

Imports nothing but Ray's own: the actor that takes the events, and Ray Train's controller (which is handed the orders on
their way), would spend seconds on importing torch and transformers before anything can begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Event = tuple[str, dict[str, Any]]

TRAIN_STATE = ".train"
"""Ray Train's own state, in a run's folder while it runs."""

PROGRESS = ("saved", "blind_shard", "stage_finished")
"""Kinds of events after which a run that fails does not begin where it began before."""


@dataclass(frozen=True)
class Orders:
    """Everything that the workers of one run are told."""

    store_uri: str
    tasks: Any  # ObjectRef of a tuple of Task: read on the workers only
    board: Any  # actor handle of a Board, or None
    owner: str  # of the leases that these workers, and those that take their place, hold


class Board:
    """Where workers put events and the driver takes them; lives with the driver."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.progress = 0

    def put(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append((kind, values))
        self.progress += kind in PROGRESS

    def num_progress(self) -> int:
        """How often something was made that a failure cannot take away."""
        return self.progress

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events
