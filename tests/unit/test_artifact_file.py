"""What is asked of a store for one file of an artifact after the other?"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.errors import UserError
from dpa_ray.stages import spec
from dpa_ray.stages.spec import ArtifactFile, ArtifactRef
from dpa_ray.store import Store
from dpa_ray.store.artifacts import Artifact, commit
from tests.s3 import S3

REF = ArtifactRef("blind", "0123456789abcdef")


@pytest.fixture(params=["local", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DPA_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spec, "_FOUND", {})
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server: S3 = request.getfixturevalue("rclone_s3")
    return Store(f"{server.uri}/some/prefix")


def committed(store: Store, folder: Path, text: str, num_files: int = 5) -> Artifact:
    folder.mkdir()
    for number in range(num_files):
        (folder / f"{number}.parquet").write_text(f"{text} {number}")
    return commit(store, REF.stage, REF.key, folder, inputs={}, meta={})


def test_the_manifest_is_read_once_and_nothing_is_listed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(store, tmp_path / "made", "q")
    asked: list[str] = []
    for name in ("read_bytes", "list"):
        plain = getattr(Store, name)

        def counted(self: Store, path: str, *rest: Any, plain: Any = plain, **named: Any) -> Any:
            asked.append(path)
            return plain(self, path, *rest, **named)

        monkeypatch.setattr(Store, name, counted)
    files = ArtifactFile(store, REF)
    assert [files(f"{number}.parquet").read_text() for number in (3, 0, 3)] == ["q 3", "q 0", "q 3"]
    assert pickle.loads(pickle.dumps(files))("1.parquet").read_text() == "q 1"
    assert asked == [f"{REF.path}/manifest.json"]


def test_what_was_made_anew_meanwhile_is_looked_at_anew(store: Store, tmp_path: Path) -> None:
    files = ArtifactFile(store, REF)
    committed(store, tmp_path / "made", "old")
    assert files("1.parquet").read_text() == "old 1"
    store.delete(REF.path)
    with pytest.raises(UserError, match=r"expected a finished artifact, found no manifest\.json"):
        files("4.parquet")
    committed(store, tmp_path / "again", "new", num_files=6)
    assert files("2.parquet").read_text() == "new 2"
    assert files("5.parquet").read_text() == "new 5", "which the one before had not"


def test_a_file_that_is_gone_or_was_never_there_is_named(store: Store, tmp_path: Path) -> None:
    files = ArtifactFile(store, REF)
    committed(store, tmp_path / "made", "q")
    files("0.parquet")
    store.delete(f"{REF.path}/4.parquet")
    with pytest.raises(UserError, match=r"4\.parquet: expected 3 bytes, found no file"):
        files("4.parquet")
    with pytest.raises(UserError, match=r"expected a file 'x', found 0\.parquet"):
        files("x")
