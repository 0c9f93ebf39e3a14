"""When is the state of a stage saved, what is in it, and what becomes of training when it cannot be?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpa_ray.data.cursor import Cursor
from dpa_ray.engine import checkpointing
from dpa_ray.engine.checkpointing import Checkpointer, Leaving, candidates, restore
from dpa_ray.engine.logs import WORDS_PREFIX, Before, Recorder
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.errors import NoAnswer
from dpa_ray.recipe import load
from dpa_ray.store import checkpoints
from dpa_ray.store.fs import Store
from tests.engine_worker import SETTINGS, Case, make_module, take_step

CPU = torch.device("cpu")
NUM_STEPS = 5
LOOK = {f"{WORDS_PREFIX}abc.jsonl": ["a look\n", "and another\n"]}


class Stage:
    """One stage on one process: real engine, store, recorder and checkpointer; steps are those of the engines' tests."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        drained: Callable[[], Leaving | None] = lambda: None,
        store: Store | None = None,
    ):
        self.store = store or Store(str(folder / "store"))
        recipe = load("tiny", ["debug.record_samples=true", *overrides])
        result = SimpleNamespace(stage="proxy-llm", key="abc")
        self.task: Any = SimpleNamespace(
            stage="proxy_llm", recipe=recipe, result=result, run_path="runs/a", num_steps=NUM_STEPS,
            data=SimpleNamespace(digest="d"), skipped=(),
        )  # fmt: skip
        self.notes: list[str] = []
        self.saved: list[int] = []
        self.drained = drained
        self.begin(Before())

    def begin(self, before: Before) -> None:
        self.engine = PlainEngine(make_module(Case(None)), SETTINGS, CPU)
        cursor = Cursor([40], seed=0, global_batch_size=8, window=40)
        self.recorder = Recorder(self.store, self.task, cursor, self.tell, before, 0.0)
        self.saver = Checkpointer(
            self.store, self.task, self.engine, self.recorder, CPU, note=self.notes.append, saved=self.saved.append,
            drained=self.drained,
        )  # fmt: skip

    def tell(self, kind: str, **values: Any) -> None:
        if kind == "note":
            self.notes.append(values["text"])

    def step(self, step: int) -> None:
        votes = self.saver.votes()
        take_step(self.engine, step - 1)
        self.saver.before_telling()
        self.recorder.record({"stage": "proxy_llm", "step": step, "loss": 1 / step}, [])
        self.saver.after(step, votes)

    def parameters(self) -> dict[str, torch.Tensor]:
        return self.engine.gather([name for name, _ in self.engine.module.model.named_parameters()])

    def whole(self) -> list[int]:
        return [checkpoint.step for checkpoint in candidates(self.store, self.task)]


def test_every_second_step_is_whole_before_the_one_after_it_is_told(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep=1")
    found = []
    for step in range(1, NUM_STEPS + 1):
        stage.step(step)
        found.append(stage.whole())
    assert found[2] == [2]
    assert found[4] == [4], "only the latest is kept"
    stage.saver.close()
    assert stage.saved == [2, 4]


def test_what_was_saved_is_what_is_restored(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=3")
    stage.begin(Before(words=LOOK))
    for step in (1, 2, 3):
        stage.step(step)
    stage.saver.close()
    at_three = stage.parameters()
    for step in (4, 5):
        stage.step(step)
    expected = stage.parameters()

    again = Stage(tmp_path, "checkpoint.every_steps=3")
    (checkpoint,) = candidates(again.store, again.task)
    before, problem = restore(again.store, checkpoint, again.engine, CPU)
    assert problem is None
    assert before.words == LOOK
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in at_three.items())
    assert [json.loads(line)["step"] for line in before.metrics] == [1, 2, 3]
    assert (before.resumed_from, len(before.samples)) == ([3], 3)
    engine = again.engine
    for step in (4, 5):
        take_step(engine, step - 1)
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in expected.items())


def test_time_alone_saves_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_s=0.000001")
    stage.step(1)
    stage.saver.close()
    assert stage.whole() == [1]
    rare = Stage(tmp_path / "rare", "checkpoint.every_s=1000")
    for step in range(1, NUM_STEPS + 1):
        rare.step(step)
    rare.saver.close()
    assert rare.whole() == []


def test_a_node_that_is_about_to_go_means_saving_at_once_and_another_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "DRAIN_EVERY_S", 0.0)
    one, two = Leaving(("a",)), Leaving(("a", "b"))
    answers = iter([None, one, one, two, two])
    stage = Stage(tmp_path, "checkpoint.every_s=1000", drained=lambda: next(answers))
    for step in range(1, NUM_STEPS + 1):
        stage.step(step)
        assert stage.whole() == {1: [], 2: [2], 3: [2], 4: [4, 2], 5: [4, 2]}[step]
    assert any("a node is about to go; step 2 is saved" in note for note in stage.notes)


def test_what_is_done_until_a_node_goes_is_saved_shortly_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node goes in an hour: saved at the notice, and once more as its time is nearly over."""
    monkeypatch.setattr(checkpointing, "DRAIN_EVERY_S", 0.0)
    now = [1e9]
    monkeypatch.setattr(checkpointing.time, "time", lambda: now[0])
    stage = Stage(tmp_path, "checkpoint.every_s=1000", drained=lambda: Leaving(("a",), 1e9 + 3600))
    expected = {1: [1], 2: [1], 3: [3, 1], 4: [3, 1], 5: [3, 1]}
    for step, passed in zip(range(1, NUM_STEPS + 1), (0, 3000, 3592, 3593, 3599), strict=True):
        now[0] = 1e9 + passed
        stage.step(step)
        stage.saver.close()
        assert stage.whole() == expected[step]


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    blocker = Path(stage.store.url("checkpoints"))
    blocker.parent.mkdir(parents=True, exist_ok=True)
    blocker.write_text("a file where a folder should be")
    for step in (1, 2, 3):
        stage.step(step)
    assert any("the checkpoint of step 2 could not be written" in note and "goes on" in note for note in stage.notes)
    blocker.unlink()
    for step in (4, 5):
        stage.step(step)
    stage.saver.close()
    assert stage.whole() == [4]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rank-00000.safetensors", b""),
        ("metrics.jsonl", b"{}"),
        ("samples.jsonl", None),
        ("rank-00000.safetensors", None),
    ],
)
def test_damage_is_named_and_changes_nothing(tmp_path: Path, file: str, damage: bytes | None) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    (checkpoint,) = candidates(stage.store, stage.task)
    if damage is None:
        stage.store.delete(f"{checkpoint.path}/{file}")
    else:
        stage.store.write_bytes(f"{checkpoint.path}/{file}", damage)
    again = Stage(tmp_path)
    fresh = again.parameters()
    _, problem = restore(again.store, checkpoint, again.engine, CPU)
    assert problem is not None
    assert f"{file}: expected" in problem
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in fresh.items())


ODD: dict[str, Any] = {
    "index": [{}, [], None, {"x": [[0, 1, "rank-00000.safetensors"]]}],
    "num_updates": ["three", None, float("inf")],
    "meta": [{}, None],
    "untaught": [None, [[1]], 5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_odd_content_is_passed_over_and_changes_nothing(tmp_path: Path, key: str, value: Any) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    (checkpoint,) = candidates(stage.store, stage.task)
    again = Stage(tmp_path)
    fresh = again.parameters()
    odd = checkpoints.Checkpoint(checkpoint.path, {**checkpoint.manifest, key: value})
    _, problem = restore(again.store, odd, again.engine, CPU)
    assert problem is not None
    assert all(torch.equal(again.parameters()[name], tensor) for name, tensor in fresh.items())


def test_a_store_that_is_away_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    (checkpoint,) = candidates(stage.store, stage.task)

    def away(*_: Any) -> None:
        raise NoAnswer("away")

    monkeypatch.setattr(checkpoints, "fetch", away)
    with pytest.raises(NoAnswer):
        restore(stage.store, checkpoint, stage.engine, CPU)


@pytest.mark.parametrize("missing", ["index", "num_updates", "meta", "untaught"])
def test_a_manifest_without_a_part_is_no_checkpoint(tmp_path: Path, missing: str) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    (checkpoint,) = candidates(stage.store, stage.task)
    manifest = {k: v for k, v in checkpoint.manifest.items() if k != missing}
    broken = checkpoints.Checkpoint(checkpoint.path, manifest)
    _, problem = restore(stage.store, broken, stage.engine, CPU)
    assert problem is not None
    assert missing in problem
    assert checkpoint.path in problem


def test_nothing_saved_is_a_pickle(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "checkpoint.every_steps=2")
    stage.step(1)
    stage.step(2)
    stage.saver.close()
    names = stage.store.list("checkpoints")
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".jsonl"}
    for name in names:
        content = stage.store.read_bytes(f"checkpoints/{name}")
        if name.endswith("safetensors"):
            size = int.from_bytes(content[:8], "little")
            content = content[8 : 8 + size]
        for line in content.splitlines() if name.endswith("jsonl") else [content]:
            json.loads(line)


def test_folders_of_killed_processes_are_removed_and_no_others() -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = Path(tempfile.mkdtemp(prefix=f"{checkpointing.TMP_PREFIX}{int(ended.stdout)}-"))
    ours = Path(tempfile.mkdtemp(prefix=f"{checkpointing.TMP_PREFIX}{1}-"))
    checkpointing.sweep_tmp()
    assert not left.exists()
    assert ours.exists()
    ours.rmdir()
