"""Does an artifact count only when it is whole, and is it what was committed when it is fetched?"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ray.errors import UserError
from dpa_ray.store import Store, artifacts
from dpa_ray.store.artifacts import Artifact, commit, content_key, digest_file, digest_folder, fetch, find
from tests.s3 import S3

STAGE, KEY = "proxy-mllm", "0123456789abcdef"
FILES = {"connector.safetensors": b"weights" * 1000, "deep/er/config.json": b"{}", "empty": b""}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(params=["local", "rclone", pytest.param("ceph", marks=pytest.mark.ci)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DPA_RAY_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server: S3 = request.getfixturevalue(f"{request.param}_s3")
    return Store(f"{server.uri}/some/prefix")


@pytest.fixture
def s3_store(rclone_s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DPA_RAY_CACHE", str(tmp_path / "cache"))
    return Store(rclone_s3.uri)


def filled(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def committed(store: Store, tmp_path: Path) -> Artifact:
    return commit(store, STAGE, KEY, filled(tmp_path / "made"), inputs={"seed": 0}, meta={"num_steps": 3})


def contents(folder: Path, names: dict[str, Any]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def edit_manifest(store: Store, change: Callable[[dict[str, Any]], Any]) -> None:
    path = f"artifacts/{STAGE}-{KEY}/manifest.json"
    manifest = store.read_json(path)
    change(manifest)
    store.write_json(path, manifest)


# Content keys.


def test_a_key_is_sha256_of_canonical_json() -> None:
    inputs = {"b": [1, 2.5, None], "a": {"ü": True}}
    text = r'{"a":{"\u00fc":true},"b":[1,2.5,null]}'
    assert content_key(inputs) == hashlib.sha256(text.encode()).hexdigest()[:16] == "1d44e843f260da50"


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_key_depends_on_values_not_on_their_order_or_a_json_round_trip(inputs: dict[str, Any]) -> None:
    assert content_key(dict(reversed(inputs.items()))) == content_key(inputs)
    assert content_key(json.loads(json.dumps(inputs))) == content_key(inputs)
    assert content_key({**inputs, "one more": 1}) != content_key(inputs)


def test_different_values_have_different_keys() -> None:
    values: list[Any] = [0, 1, 1.5, "1", "", None, False, True, [], [1], [[1]], {}, {"a": 1}, [1, 2], [2, 1], "None"]
    assert len({content_key({"x": value}) for value in values}) == len(values)
    assert content_key({"x": (1, 2)}) == content_key({"x": [1, 2]})


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1}, b"x", Path("x"), object(), {1: 2}, {"a": [{None: 1}]}, 1j]
)
def test_what_json_has_not_gets_no_key(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        content_key({"x": value})


def test_a_cycle_gets_no_key() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="a cycle"):
        content_key({"x": cycle})


# Commit and find.


def test_what_is_committed_is_found_and_fetched(store: Store, tmp_path: Path) -> None:
    assert find(store, STAGE, KEY) is None
    artifact = committed(store, tmp_path)
    assert artifact.path == f"artifacts/{STAGE}-{KEY}"
    assert find(store, STAGE, KEY) == artifact
    assert contents(fetch(store, artifact), FILES) == FILES
    manifest = store.read_json(f"{artifact.path}/manifest.json")
    assert manifest == artifact.manifest
    assert (manifest["schema"], manifest["stage"], manifest["key"]) == (1, STAGE, KEY)
    assert (manifest["inputs"], manifest["meta"]) == ({"seed": 0}, {"num_steps": 3})
    assert {"dpa_ray", "python", "torch", "transformers"} <= set(manifest["versions"])
    sums = {n: {"size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in FILES.items()}
    assert manifest["files"] == artifact.files == sums


def test_an_artifact_may_have_no_files(store: Store, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    artifact = commit(store, "base-llm", KEY, tmp_path / "made", inputs={}, meta={"commit": "abc"})
    assert find(store, "base-llm", KEY) == artifact
    assert fetch(store, artifact).is_dir()


def test_without_its_manifest_there_is_no_artifact(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    store.delete(f"{artifact.path}/manifest.json")
    assert find(store, STAGE, KEY) is None


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, order, replace = Store(str(tmp_path / "store")), [], os.replace

    def noted(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    committed(store, tmp_path)
    assert order[-1] == "manifest.json"
    assert sorted(order[:-1]) == sorted(Path(name).name for name in FILES)


def test_leftovers_of_a_broken_attempt_are_removed(store: Store, tmp_path: Path) -> None:
    store.write_bytes(f"artifacts/{STAGE}-{KEY}/left.bin", b"half")
    store.write_bytes(f"artifacts/{STAGE}-{KEY}/empty", b"half")
    artifact = committed(store, tmp_path)
    assert store.list(artifact.path) == sorted([*FILES, "manifest.json"])
    assert contents(fetch(store, artifact), FILES) == FILES


def test_a_failed_commit_is_none_and_can_be_repeated(store: Store, tmp_path: Path) -> None:
    made = filled(tmp_path / "made")
    (made / "vanishing").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        committed(store, tmp_path)
    assert find(store, STAGE, KEY) is None
    (made / "vanishing").unlink()
    assert contents(fetch(store, committed(store, tmp_path)), FILES) == FILES


def test_a_committed_artifact_is_not_touched_again(store: Store, tmp_path: Path) -> None:
    first = committed(store, tmp_path)
    other = filled(tmp_path / "other", {"connector.safetensors": b"other"})
    assert commit(store, STAGE, KEY, other, inputs={"seed": 1}, meta={}) == first
    assert contents(fetch(store, first), FILES) == FILES


def test_what_cannot_be_in_a_manifest_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, made = Store(str(tmp_path / "store")), filled(tmp_path / "made")
    for inputs, meta in (({"x": float("nan")}, {}), ({}, {"path": Path("x")}), ({"x": {1: 2}}, {})):
        with pytest.raises((TypeError, ValueError)):
            commit(store, STAGE, KEY, made, inputs=inputs, meta=meta)
    filled(made, {"manifest.json": b"{}"})
    with pytest.raises(ValueError, match=r"expected no manifest\.json"):
        commit(store, STAGE, KEY, made, inputs={}, meta={})
    assert not (tmp_path / "store").exists()


def test_unknown_stages_and_keys_that_are_paths_are_refused(tmp_path: Path) -> None:
    for stage, key in (("proxy", KEY), (STAGE, "../x"), (STAGE, "")):
        with pytest.raises(ValueError, match="expected"):
            find(Store(str(tmp_path)), stage, key)


def test_an_artifact_under_another_ones_name_is_none(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    store.copy(artifact.path, f"artifacts/proxy-llm-{KEY}")
    store.copy(artifact.path, f"artifacts/{STAGE}-feedfeedfeedfeed")
    assert find(store, "proxy-llm", KEY) is None
    assert find(store, STAGE, "feedfeedfeedfeed") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "expected a manifest of schema 1, found schema 2"),
        (lambda m: m.pop("schema"), "expected a manifest, found other JSON"),
        (lambda m: m.pop("files"), "expected 'files' in the manifest as dict, found None"),
        (lambda m: m["files"].update({"../../x": m["files"]["empty"]}), "found '../../x'"),
        (lambda m: m["files"].update({"/etc/x": m["files"]["empty"]}), "found '/etc/x'"),
        (
            lambda m: m["files"].update({"x": {"size_bytes": -1, "sha256": "0" * 64}}),
            "expected size_bytes and sha256 of 'x'",
        ),
        (lambda m: m["files"].update({"x": {"size_bytes": 1, "sha256": "0"}}), "expected size_bytes and sha256 of 'x'"),
        (lambda m: m["files"].update({"x": 1}), "expected size_bytes and sha256 of 'x'"),
    ],
)
def test_a_manifest_that_is_none_is_named(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    committed(store, tmp_path)
    edit_manifest(store, change)
    for call in (lambda: find(store, STAGE, KEY), lambda: committed(store, tmp_path)):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)
        assert store.url(f"artifacts/{STAGE}-{KEY}/manifest.json") in str(error.value)
        assert f"delete {store.url(f'artifacts/{STAGE}-{KEY}')} and run again" in str(error.value)


def test_a_manifest_that_is_no_json_is_named(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    for data in (b"", b'{"schema": 1', b"\xff\xfe\x00", b"[1]"):
        store.write_bytes(f"{artifact.path}/manifest.json", data)
        with pytest.raises(UserError, match=r"manifest\.json: expected .* found .*; delete"):
            find(store, STAGE, KEY)


# Fetch.


def test_every_kind_of_damage_is_named_with_what_was_expected_and_found(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    flipped = b"Weights" + FILES["connector.safetensors"][7:]
    store.write_bytes(f"{artifact.path}/connector.safetensors", flipped)
    store.write_bytes(f"{artifact.path}/deep/er/config.json", b"{")
    store.delete(f"{artifact.path}/empty")
    for _ in range(2):  # what was refused once must not be in the cache the second time
        with pytest.raises(UserError) as error:
            fetch(store, artifact)
        text = str(error.value)
        digests = [hashlib.sha256(data).hexdigest() for data in (FILES["connector.safetensors"], flipped)]
        assert f"connector.safetensors: expected SHA-256 {digests[0]}, found {digests[1]}" in text
        assert "deep/er/config.json: expected 2 bytes, found 1" in text
        assert "empty: expected 0 bytes, found no file" in text
        assert f"{store.url(artifact.path)}: 3 of 3 files" in text
        assert f"delete {store.url(artifact.path)} and run again" in text


def test_a_file_that_nobody_committed_never_reaches_a_loader(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    store.write_bytes(f"{artifact.path}/pytorch_model.bin", b"pickle")
    if store.is_local:
        with pytest.raises(UserError, match=r"pytorch_model\.bin: expected no such file"):
            fetch(store, artifact)
    else:
        assert not (fetch(store, artifact) / "pytorch_model.bin").exists()


def test_some_files_are_fetched_and_checked_alone(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, tmp_path)
    store.write_bytes(f"{artifact.path}/connector.safetensors", b"broken")
    folder = fetch(store, artifact, names=["deep/er/config.json"])
    assert (folder / "deep/er/config.json").read_bytes() == b"{}"
    if not store.is_local:
        assert not (folder / "connector.safetensors").exists()
    with pytest.raises(UserError, match=r"expected a file 'x\.bin', found connector\.safetensors, deep"):
        fetch(store, artifact, names=["x.bin"])


def test_a_local_artifact_is_used_where_it_lies(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    artifact = committed(store, tmp_path)
    assert fetch(store, artifact) == tmp_path / "store" / artifact.path


def test_a_checked_copy_is_not_fetched_twice(s3_store: Store, rclone_s3: S3, tmp_path: Path) -> None:
    artifact = committed(s3_store, tmp_path)
    folder = fetch(s3_store, artifact)
    assert folder.is_relative_to(tmp_path / "cache")
    before = {name: (folder / name).stat().st_ino for name in FILES}
    s3_store.delete(artifact.path)  # so that a second download would fail
    assert fetch(s3_store, artifact) == folder
    assert {name: (folder / name).stat().st_ino for name in FILES} == before


def test_a_damaged_copy_is_fetched_again(s3_store: Store, tmp_path: Path) -> None:
    artifact = committed(s3_store, tmp_path)
    folder = fetch(s3_store, artifact)
    (folder / "connector.safetensors").write_bytes(b"Weights" * 1000)
    (folder / "empty").unlink()
    assert contents(fetch(s3_store, artifact), FILES) == FILES


def test_an_artifact_made_anew_is_not_mistaken_for_its_cached_copy(s3_store: Store, tmp_path: Path) -> None:
    fetch(s3_store, committed(s3_store, tmp_path))
    s3_store.delete(f"artifacts/{STAGE}-{KEY}")
    other = {"connector.safetensors": b"different" * 100}
    artifact = commit(s3_store, STAGE, KEY, filled(tmp_path / "other", other), inputs={}, meta={})
    folder = fetch(s3_store, artifact)
    assert contents(folder, other) == other
    assert not (folder / "empty").exists()


FETCHER = """
    import os, signal, sys
    from dpa_ray.store import Store, artifacts
    if sys.argv[2] == "killed":  # after the download, before the files are in their place
        os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
    store = Store(sys.argv[1])
    folder = artifacts.fetch(store, artifacts.find(store, "proxy-mllm", "0123456789abcdef"))
    print((folder / "connector.safetensors").read_bytes() == b"weights" * 1000)
"""


def fetcher(store: Store, how: str = "whole") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(FETCHER), store.uri, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_may_fetch_the_same_artifact_at_once(s3_store: Store, tmp_path: Path) -> None:
    committed(s3_store, tmp_path)
    killed = fetcher(s3_store, "killed")
    others = [fetcher(s3_store) for _ in range(3)]
    outcomes = [process.communicate(timeout=100) for process in others]
    assert [out for out, _ in outcomes] == ["True\n"] * 3, outcomes
    killed.communicate(timeout=100)
    # it fetched first and was killed, or came late and had nothing left to fetch
    assert killed.returncode in (-signal.SIGKILL, 0)


def test_a_killed_fetch_leaves_a_cache_that_works(s3_store: Store, tmp_path: Path) -> None:
    artifact = committed(s3_store, tmp_path)
    process = fetcher(s3_store, "killed")
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert contents(fetch(s3_store, artifact), FILES) == FILES


# Digests.


def test_a_digest_is_never_out_of_date(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for number in range(50):  # same size, within one tick of the clock
        data = f"{number:04}".encode()
        path.write_bytes(data)
        assert digest_file(path) == hashlib.sha256(data).hexdigest()


def test_a_change_that_keeps_size_mtime_and_inode_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that is remembered: its ctime is another, which nobody can set back."""
    monkeypatch.setattr("dpa_ray.store.digests.SETTLED_NS", -1)
    path = tmp_path / "x"
    path.write_bytes(b"1111")
    status = path.stat()
    digest_file(path)
    time.sleep(0.05)  # some ticks of the file system's clock
    path.write_bytes(b"2222")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_ino == status.st_ino
    assert digest_file(path) == hashlib.sha256(b"2222").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within a tick of a coarse clock, with nothing to tell it by."""
    path, asked, file_digest = tmp_path / "x", [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: (asked.append(1), file_digest(*args))[1])
    path.write_bytes(b"1")
    assert digest_file(path) == digest_file(path)
    assert len(asked) == 2


def test_a_digest_is_not_computed_twice_for_a_settled_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "x", []
    path.write_bytes(b"1")
    monkeypatch.setattr("dpa_ray.store.digests.SETTLED_NS", -1)
    digest = digest_file(path)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: asked.append(1))
    assert digest_file(path) == digest
    assert asked == []


def test_a_folder_has_the_digests_of_its_files(tmp_path: Path) -> None:
    sums = {n: {"size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in sorted(FILES.items())}
    assert digest_folder(filled(tmp_path)) == sums
    assert list(digest_folder(tmp_path)) == sorted(FILES)
    assert digest_folder(tmp_path, ["empty"]) == {"empty": sums["empty"]}
    assert artifacts.digest_file(tmp_path / "empty") == sums["empty"]["sha256"]
