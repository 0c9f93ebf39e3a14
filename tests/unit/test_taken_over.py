"""Does a process that another one has replaced leave alone what is now the other one's?"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpa_ray.engine.worker import Worker
from dpa_ray.errors import LeaseTaken
from dpa_ray.stages.spec import ArtifactRef
from dpa_ray.store import artifacts
from dpa_ray.store.fs import Store
from tests.files import Asked, fill
from tests.unit.test_checkpointing import Stage

STAGE, KEY = "instruct", "1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_an_artifact_is_neither_begun_nor_finished(store: Store, tmp_path: Path) -> None:
    """Asked before the first thing is removed, and before the manifest."""
    fill(tmp_path / "made", x=1)
    path = ArtifactRef(STAGE, KEY).path
    store.write_bytes(f"{path}/y", b"the successor's")
    with pytest.raises(LeaseTaken):
        artifacts.commit(store, STAGE, KEY, tmp_path / "made", inputs={}, meta={}, confirm=Asked(1))
    assert store.list(path) == ["y"]
    with pytest.raises(LeaseTaken):
        artifacts.commit(store, STAGE, KEY, tmp_path / "made", inputs={}, meta={}, confirm=Asked(2))
    assert artifacts.find(store, STAGE, KEY) is None
    artifacts.commit(store, STAGE, KEY, tmp_path / "made", inputs={}, meta={}, confirm=Asked(3))
    assert artifacts.find(store, STAGE, KEY) is not None


def test_older_checkpoints_are_not_removed(tmp_path: Path) -> None:
    """The successor may be reading one of them."""
    stage = Stage(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep=1")
    for step in (1, 2, 3):
        stage.step(step)
    assert stage.whole() == [2]
    stage.saver.confirm = Asked(2)  # after the manifest, before older ones go
    stage.step(4)
    stage.saver.close()
    assert stage.whole() == [4, 2]


def test_a_worker_ends_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy: another byte of it would be written over the successor's."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    worker: Any = SimpleNamespace(store=store, note=print, confirm=None)
    task: Any = SimpleNamespace(result=ArtifactRef(STAGE, KEY))
    with pytest.raises(LeaseTaken), Worker.alone(worker, task, "job-a"):
        store.write_bytes(f"{task.result.lease}/2.json", b"{}")
    assert codes == [1]
