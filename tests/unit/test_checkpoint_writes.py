"""In which order is a checkpoint written, one at a time, and from all ranks; and what if only a part of it is there?"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from dpa_ray.engine import checkpointing, state
from dpa_ray.engine.checkpointing import candidates, restore
from dpa_ray.errors import UserError
from dpa_ray.store import checkpoints
from dpa_ray.store.digests import digest_folder
from dpa_ray.store.fs import Store
from tests.unit.test_checkpointing import CPU, Stage

WAIT_S = 20.0


class Watched(Store):
    """Remembers what was written, in order: each file's name, "files" for an upload."""

    def __init__(self, uri: str):
        super().__init__(uri)
        self.order: list[str] = []

    def upload(self, folder: Path, path: str, names: list[str] | None = None) -> None:  # type: ignore[override]
        super().upload(folder, path, names)
        self.order.append("files")

    def write_json(self, path: str, value: object) -> None:
        super().write_json(path, value)
        self.order.append(path.rpartition("/")[2])


def test_a_checkpoint_is_whole_when_every_ranks_part_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two is real; what the other one has and notes down is written here, later."""
    monkeypatch.setattr(checkpointing, "world_size", lambda: 2)
    store = Watched(str(tmp_path / "store"))
    stage = Stage(tmp_path, store=store)
    stage.step(1)
    others = state.snapshot(state.share(stage.engine.fragments(), 1, 2))
    expected = stage.parameters()
    stage.saver._save(1, by_steps=True)
    pending = stage.saver.pending
    assert pending is not None
    assert pending.thread is not None
    until = time.monotonic() + WAIT_S
    while "rank-00000.json" not in store.order and time.monotonic() < until:
        time.sleep(0.01)
    pending.thread.join(6 * checkpointing.POLL_S)
    assert pending.busy, "it waits for the other rank"
    assert stage.whole() == []

    folder = tmp_path / "other"
    folder.mkdir()
    stretches = state.save(others, folder / "rank-00001.safetensors")
    there = Store(store.uri)
    there.upload(folder, pending.path)
    note = {"files": digest_folder(folder), "fragments": stretches, "untaught": [[7, None, "a#7"]]}
    there.write_json(f"{pending.path}/rank-00001.json", note)
    stage.saver.close()
    assert store.order == ["files", "rank-00000.json", "manifest.json"], "a note vouches for what is there"

    (checkpoint,) = candidates(store, stage.task)
    again = Stage(tmp_path / "again", store=store)
    before, problem = restore(store, checkpoint, again.engine, CPU)
    assert problem is None
    assert before.untaught == {7: (None, "a#7")}
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in expected.items())


class SlowManifests(Store):
    """Writes the first manifest when `go` is set; `most` is how many were on their way at once."""

    def __init__(self, uri: str):
        super().__init__(uri)
        self.go, self.most, self._now, self._lock = threading.Event(), 0, 0, threading.Lock()

    def write_json(self, path: str, value: object) -> None:
        if not path.endswith("manifest.json"):
            super().write_json(path, value)
            return
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.go.wait(WAIT_S)
        super().write_json(path, value)
        with self._lock:
            self._now -= 1


def test_what_time_asks_for_waits_for_what_is_being_written(tmp_path: Path) -> None:
    """No step stands still for it: it is skipped."""
    store = SlowManifests(str(tmp_path / "store"))
    stage = Stage(tmp_path, "checkpoint.every_s=0.000001", store=store)
    stage.step(1)
    first = stage.saver.pending
    stage.step(2)
    assert stage.saver.pending is first
    store.go.set()
    stage.saver.close()
    assert (stage.whole(), store.most) == ([1], 1)


def test_what_steps_ask_for_begins_after_what_time_asked_for_is_whole(tmp_path: Path) -> None:
    store = SlowManifests(str(tmp_path / "store"))
    overrides = ("checkpoint.every_s=0.000001", "checkpoint.every_steps=2", "checkpoint.keep=9")
    stage = Stage(tmp_path, *overrides, store=store)
    stage.step(1)
    assert stage.saver.pending is not None
    threading.Timer(0.5, store.go.set).start()
    stage.step(2)
    stage.saver.close()
    assert (stage.whole(), store.most) == ([2, 1], 1)


def test_time_counts_from_the_last_checkpoint_of_any_kind(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_s=1000", "checkpoint.every_steps=4", "checkpoint.keep=9")
    for step in range(1, 6):
        if step in (2, 4):
            stage.saver.last_save -= 1001  # as when that much time has passed
        stage.step(step)
        stage.saver.close()
    assert stage.whole() == [4, 2]


def test_no_checkpoint_counts_before_the_metrics_up_to_it_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")

    def away() -> None:
        raise UserError("the metrics' place is away")

    monkeypatch.setattr(stage.recorder.log, "flush", away)
    for step in (1, 2, 3):
        stage.step(step)
    assert stage.whole() == []
    assert any("the metrics' place is away" in note for note in stage.notes)


def test_what_goes_beyond_the_stages_length_is_not_taken_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep=9")
    for step in range(1, 5):
        stage.step(step)
    stage.saver.close()
    stage.task.num_steps = 4
    assert stage.whole() == [4, 2]
    stage.task.num_steps = 3
    assert stage.whole() == [2]


def test_whoever_loaded_a_part_before_it_failed_is_as_before(tmp_path: Path) -> None:
    """Its last parameter is said to lie in two stretches, of which the file has one: all others were loaded by then."""
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    (checkpoint,) = candidates(stage.store, stage.task)
    again = Stage(tmp_path)
    fresh = again.parameters()
    last = again.engine.fragments()[-1].name
    index = dict(checkpoint.manifest["index"])
    ((start, length, file),) = index[last]
    index[last] = [[start, 1, file], [start + 1, length - 1, file]]
    odd = checkpoints.Checkpoint(checkpoint.path, {**checkpoint.manifest, "index": index})
    _, problem = restore(again.store, odd, again.engine, CPU)
    assert problem is not None
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in fresh.items())
