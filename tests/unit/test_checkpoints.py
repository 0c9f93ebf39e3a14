"""Which checkpoints of a stage count, and what is said of those that do not?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.store import checkpoints
from dpa_ray.store.cache import forget
from dpa_ray.store.digests import digest_folder
from dpa_ray.store.fs import Store
from tests.s3 import S3

STAGE, KEY = "proxy-llm", "abc123"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def save(store: Store, step: int, attempt: str = "a", content: str = "state", whole: bool = True) -> str:
    """A checkpoint of one file; its path."""
    path = checkpoints.path_of(STAGE, KEY, step, attempt)
    source = Path(store.url("")).parent / f"source-{step}-{attempt}"
    source.mkdir()
    (source / "file").write_text(content)
    store.upload(source, path)
    if whole:
        checkpoints.finish(store, path, STAGE, KEY, step, {"files": digest_folder(source)})
    return path


def steps(store: Store, stage: str = STAGE, key: str = KEY) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.whole_ones(store, stage, key)]


def test_the_latest_comes_first_and_what_has_no_manifest_does_not_count(store: Store) -> None:
    assert steps(store) == []
    for step in (2, 10, 4):
        save(store, step)
    save(store, 12, whole=False)
    assert steps(store) == [10, 4, 2]
    assert steps(store, key="abc124") == steps(store, stage="instruct") == []


def test_only_the_latest_are_kept_and_what_a_kill_left_goes(store: Store) -> None:
    for step in (2, 4, 6):
        save(store, step)
    save(store, 7, whole=False)
    newest = save(store, 8)
    checkpoints.collect(store, STAGE, KEY, keep=2, newest=newest)
    assert steps(store) == [8, 6]
    assert len(store.list_dirs(checkpoints.folder(STAGE, KEY))) == 2


class DiesAfterTheFirst(Store):
    """A process that is killed in the second removal."""

    num_removed = 0

    def delete(self, path: str) -> None:
        if self.num_removed == 1:
            raise KeyboardInterrupt
        self.num_removed += 1
        super().delete(path)


def test_a_removal_that_is_broken_off_leaves_nothing_that_looks_whole(store: Store) -> None:
    save(store, 2)
    newest = save(store, 6)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.collect(DiesAfterTheFirst(store.uri), STAGE, KEY, keep=1, newest=newest)
    assert steps(store) == [6]
    assert store.list(checkpoints.path_of(STAGE, KEY, 2, "a")) == ["file"], "what is left has no manifest"
    checkpoints.collect(store, STAGE, KEY, keep=1, newest=newest)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.drop(DiesAfterTheFirst(store.uri), STAGE, KEY)
    assert steps(store) == []
    assert store.list(newest) == ["file"]


def test_an_older_step_that_was_just_saved_stays(store: Store) -> None:
    """Those after it were damaged, say: the run went on from before them."""
    for step in (8, 10):
        save(store, step)
    save(store, 4)
    newest = save(store, 6, attempt="b")
    checkpoints.collect(store, STAGE, KEY, keep=2, newest=newest)
    assert steps(store) == [6, 4], "damaged ones take nobody's place"


def test_files_are_checked_when_they_are_fetched(store: Store) -> None:
    path = save(store, 2)
    (checkpoint,) = checkpoints.whole_ones(store, STAGE, KEY)
    assert (checkpoints.fetch(store, checkpoint, ["file"]) / "file").read_text() == "state"
    with pytest.raises(UserError, match="expected other among its files, found none"):
        checkpoints.fetch(store, checkpoint, ["other"])
    store.write_bytes(f"{path}/file", b"stale")
    with pytest.raises(UserError, match=r"step-00000002-a: file: expected SHA-256 .* found"):
        checkpoints.fetch(store, checkpoint, ["file"])
    store.write_bytes(f"{path}/file", b"st")
    with pytest.raises(UserError, match="file: expected 5 bytes, found 2"):
        checkpoints.fetch(store, checkpoint, ["file"])
    store.delete(f"{path}/file")
    with pytest.raises(UserError, match="file: expected 5 bytes, found no file"):
        checkpoints.fetch(store, checkpoint, ["file"])


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "digest": checkpoints._digest(manifest)}


GOOD = {"schema": 1, "stage": STAGE, "key": KEY, "step": 3, "files": {"x": {"size_bytes": 1, "sha256": "0" * 64}}}
BAD: dict[str, Any] = {
    "no JSON": b"{",
    "binary": b"\xff\x00",
    "a list": [],
    "another schema": {**GOOD, "schema": 2},
    "another key": {**GOOD, "key": "abc124"},
    "another stage": {**GOOD, "stage": "instruct"},
    "no step": {k: v for k, v in GOOD.items() if k != "step"},
    "a step as text": {**GOOD, "step": "3"},
    "step true": {**GOOD, "step": True},
    "step 0": {**GOOD, "step": 0},
    "no files": {**GOOD, "files": None},
    "a file outside": {**GOOD, "files": {"../x": {"size_bytes": 1, "sha256": "0" * 64}}},
    "an absolute file": {**GOOD, "files": {"/etc/passwd": {"size_bytes": 1, "sha256": "0" * 64}}},
    "no digest": {**GOOD, "files": {"x": {"size_bytes": 1}}},
    "a size as text": {**GOOD, "files": {"x": {"size_bytes": "1", "sha256": "0" * 64}}},
}


@pytest.mark.parametrize("manifest", BAD.values(), ids=BAD)
def test_a_manifest_that_is_none_is_named_and_passed_over(
    store: Store, manifest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 2)
    path = f"{checkpoints.path_of(STAGE, KEY, 3, 'b')}/manifest.json"
    if isinstance(manifest, dict):
        manifest = signed(manifest)
    store.write_bytes(path, manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    assert steps(store) == [2]
    assert store.url(path) in caplog.text


def test_the_good_manifest_is_good(store: Store) -> None:
    """Else the cases above would say nothing."""
    store.write_json(f"{checkpoints.path_of(STAGE, KEY, 3, 'b')}/manifest.json", signed(GOOD))
    assert steps(store) == [3]


def test_a_flipped_bit_anywhere_in_a_manifest_is_seen(store: Store) -> None:
    path = f"{save(store, 2)}/manifest.json"
    content = store.read_bytes(path)
    assert steps(store) == [2]
    for place in range(len(content)):
        for bit in (0, 1, 4):
            store.write_bytes(path, content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            found = [c.manifest for c in checkpoints.whole_ones(store, STAGE, KEY)]
            assert found in ([], [json.loads(content)]), "space for space and the like changes nothing"


def test_a_manifest_in_the_folder_of_another_step_does_not_count(store: Store) -> None:
    store.write_json(f"{checkpoints.path_of(STAGE, KEY, 4, 'b')}/manifest.json", signed(GOOD))
    assert steps(store) == []


class Away(Store):
    """A store whose server does not answer when a manifest is asked for."""

    def read_json(self, path: str) -> Any:
        raise NoAnswer("away")


def test_an_outage_is_not_taken_for_damage(store: Store) -> None:
    newest = save(store, 2)
    with pytest.raises(NoAnswer):
        checkpoints.whole_ones(Away(store.uri), STAGE, KEY)
    with pytest.raises(NoAnswer):
        checkpoints.collect(Away(store.uri), STAGE, KEY, keep=1, newest=newest)
    assert steps(store) == [2]


def test_a_finished_stage_leaves_none(store: Store) -> None:
    save(store, 2)
    save(store, 4, whole=False)
    checkpoints.drop(store, STAGE, KEY)
    assert store.list("checkpoints") == []
    checkpoints.drop(store, STAGE, KEY)


@pytest.mark.parametrize("what", ["the checkpoint", "the stage"])
def test_the_local_copy_of_a_checkpoint_is_forgotten(
    what: str, rclone_s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that go on from many of them would fill their disks."""
    monkeypatch.setenv("DPA_RAY_CACHE", str(tmp_path / "cache"))
    store, made = Store(rclone_s3.uri), Store(str(tmp_path / "made"))
    for step in (2, 20):  # the folder of one begins as that of the other
        path = save(made, step)
        store.upload(Path(made.url(path)), path)
    latest, before = checkpoints.whole_ones(store, STAGE, KEY)
    for checkpoint in (latest, before):
        assert (checkpoints.fetch(store, checkpoint, ["file"]) / "file").read_text() == "state"
    forget(before.path if what == "the checkpoint" else checkpoints.folder(STAGE, KEY))
    left = [file for file in (tmp_path / "cache").rglob("file") if file.is_file()]
    assert len(left) == (1 if what == "the checkpoint" else 0)
    assert (checkpoints.fetch(store, before, ["file"]) / "file").read_text() == "state"
