"""Does a worker get each batch once, in order, though the process that makes them dies in between? Without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from dpa_ray.engine import feed
from dpa_ray.engine.feed import Feed

NUM = 7
PREFETCH = 3


class FakeActor:
    """A Feeder as its handle shows it, which dies of the batch `dies_at`; batches are numbers."""

    def __init__(self, dies_at: int | None):
        self.dies_at, self.num_asked = dies_at, 0
        self.batches: Iterator[int] = iter(())
        self.start = SimpleNamespace(remote=self._start)
        self.next = SimpleNamespace(remote=self._next)

    def _start(self, loader: Any, micro_batches: Any, prefetch: int, workers: int) -> None:
        self.batches = iter(micro_batches)

    def _next(self) -> Callable[[], feed.Answer]:
        self.num_asked += 1
        batch: Any = next(self.batches)

        def answer() -> feed.Answer:
            if batch == self.dies_at:
                raise RayActorError
            return batch, ""

        return answer


def test_another_process_goes_on_where_the_one_that_died_was(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = [FakeActor(2), FakeActor(5), FakeActor(None)]
    left = iter(actors)
    monkeypatch.setattr(feed, "_actor", lambda: next(left))
    monkeypatch.setattr(feed.ray, "kill", lambda actor: None)
    monkeypatch.setattr(feed.ray, "get", lambda answer, timeout: answer())
    monkeypatch.setattr(feed.wire, "loads", lambda packed: packed)
    loader: Any = None
    micro_batches: Any = list(range(NUM))
    notes: list[str] = []
    batches = Feed().batches(loader, micro_batches, prefetch=PREFETCH, workers=1, note=notes.append)
    assert list(batches) == micro_batches
    assert [note.partition("; ")[0] for note in notes] == [
        f"the process that feeds this worker died at batch {number}" for number in (3, 6)
    ]
    # 0 to 4; 2 to 6, of which 5 and 6 were only asked for; 5 and 6: none is asked for that there is not
    assert [actor.num_asked for actor in actors] == [5, 5, 2]
