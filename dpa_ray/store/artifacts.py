"""How stages hand over: artifacts, folders under a content key that count once their manifest is written."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpa_ray
from dpa_ray.errors import UserError
from dpa_ray.store.cache import cached
from dpa_ray.store.digests import differences, digest_file, digest_folder
from dpa_ray.store.fs import FILES_AT_ONCE, Store, checked_path
from dpa_ray.store.local import files_under
from dpa_ray.store.threads import each

__all__ = ["STAGES", "Artifact", "commit", "content_key", "digest_file", "digest_folder", "fetch", "find", "verify"]

STAGES = (
    "base-llm",
    "base-vision",
    "proxy-llm",
    "proxy-merged",
    "blind",
    "proxy-mllm",
    "blind-instruct",
    "instruct",
    "eval",
)
MANIFEST = "manifest.json"
SCHEMA = 1
KEYS = ("schema", "stage", "key", "files", "inputs", "meta", "versions", "created", "digest")
VERSIONED = ("torch", "transformers", "peft", "deepspeed", "ray", "safetensors", "pyarrow")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A committed artifact. `manifest` holds schema, stage, key, files, inputs, meta, versions and created."""

    stage: str
    key: str
    manifest: dict[str, Any]

    @property
    def path(self) -> str:
        """Its folder in the store."""
        return _path(self.stage, self.key)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """{name: {"size_bytes", "sha256"}}."""
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        return files


def content_key(inputs: Mapping[str, Any]) -> str:
    """16 hex digits that name `inputs`: of SHA-256 over their JSON with sorted keys and no spaces.

    Raises: TypeError for a value or key that JSON has not; ValueError for NaN, infinities and cycles.
    """
    text = json.dumps(_plain(dict(inputs), "inputs", 0), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any, place: str, depth: int) -> Any:
    """`value` with tuples as lists, after a check that no two different values would give the same JSON."""
    if depth > 100:
        raise ValueError(f"{place[:200]}: expected plain values, found more than 100 levels (a cycle?)")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):  # json would write 1 and "1" alike
                raise TypeError(f"{place}: expected text as key, found {key!r}")
        return {key: _plain(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{place}: expected text, a number, true, false, null, a list or a mapping, found {value!r}")


def _path(stage: str, key: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"expected one of {', '.join(STAGES)}; found stage {stage!r}")
    if not re.fullmatch(r"[A-Za-z0-9]+", key):
        raise ValueError(f"expected a content key, found {key!r}")
    return f"artifacts/{stage}-{key}"


def find(store: Store, stage: str, key: str) -> Artifact | None:
    """The committed artifact of this stage and key, or None where there is none, or one of another stage or key.

    Raises: UserError where there is a manifest that cannot be read.
    """
    path = f"{_path(stage, key)}/{MANIFEST}"
    try:
        data = store.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as err:
        remedy = _remedy(store, stage, key)
        raise UserError(f"{store.url(path)}: expected JSON, found {len(data)} bytes that are none; {remedy}") from err
    if (problem := _problem(manifest)) is not None:
        raise UserError(f"{store.url(path)}: {problem}; {_remedy(store, stage, key)}")
    if (manifest["stage"], manifest["key"]) != (stage, key):
        return None
    if (digest := manifest.get("digest", "")) not in ("", _digest(manifest)):  # older ones have none
        raise UserError(
            f"{store.url(path)}: expected content with SHA-256 {digest}, found {_digest(manifest)}; "
            f"{_remedy(store, stage, key)}"
        )
    return Artifact(stage, key, manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _problem(manifest: Any) -> str | None:
    """What is wrong with the content of a manifest, if anything."""
    if not isinstance(manifest, dict) or "schema" not in manifest:
        return "expected a manifest, found other JSON"
    if manifest["schema"] != SCHEMA:
        return (
            f"expected a manifest of schema {SCHEMA}, found schema {manifest['schema']!r} (another version of dpa_ray?)"
        )
    if strange := sorted(manifest.keys() - KEYS):
        return f"expected {', '.join(KEYS)} in the manifest, found {strange[0][:40]!r}"
    kinds = {"stage": str, "key": str, "files": dict, "inputs": dict, "meta": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            return f"expected {name!r} in the manifest as {kind.__name__}, found {manifest.get(name)!r}"
    for name, file in manifest["files"].items():
        try:
            checked_path(name)
        except ValueError as err:
            return f"in the manifest's files, {err}"
        size, digest = (file.get("size_bytes"), file.get("sha256")) if isinstance(file, dict) else (None, None)
        if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", str(digest)) or name == MANIFEST:
            return f"expected size_bytes and sha256 of {name!r} in the manifest, found {file!r}"
    return None


def _remedy(store: Store, stage: str, key: str) -> str:
    return f"delete {store.url(_path(stage, key))} and run again: it is then made anew"


def commit(
    store: Store,
    stage: str,
    key: str,
    folder: Path,
    *,
    inputs: Mapping[str, Any],
    meta: Mapping[str, Any],
    confirm: Callable[[], None] = lambda: None,
) -> Artifact:
    """Upload the files under `folder`, then the manifest, which makes them an artifact. A folder may be empty.

    An artifact that is there already is returned untouched; what a broken-off attempt left is removed first. Two
    processes should not commit one key at once (that is what leases are for). Should they, the last one to finish
    stands with its own files, save where both write one file at the same time: then `fetch` refuses the artifact.
    `confirm` raises where another process may have taken the work over; it is asked before anything is removed, and
    before the manifest.
    Raises: ValueError where `folder` has a manifest.json; TypeError or ValueError where inputs or meta are no JSON.
    """
    if (there := find(store, stage, key)) is not None:
        return there
    path, names = _path(stage, key), files_under(folder)
    if MANIFEST in names:
        raise ValueError(f"{folder}: expected no {MANIFEST}, which is the artifact's own")
    manifest = {
        "schema": SCHEMA,
        "stage": stage,
        "key": key,
        "files": digest_folder(folder, names),
        "inputs": _plain(dict(inputs), "inputs", 0),
        "meta": _plain(dict(meta), "meta", 0),
        "versions": _versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    json.dumps(manifest, allow_nan=False)  # before anything is written
    manifest["digest"] = _digest(manifest)
    confirm()
    store.delete(path)
    store.upload(folder, path, names)
    if (there := find(store, stage, key)) is not None:
        if there.files == manifest["files"]:
            return there
        _log.warning("%s was committed by another process meanwhile; it is replaced by this one's", store.url(path))
    confirm()
    store.write_json(f"{path}/{MANIFEST}", manifest)
    return Artifact(stage, key, manifest)


def _versions() -> dict[str, str]:
    versions = {"dpa_ray": dpa_ray.__version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def fetch(store: Store, artifact: Artifact, *, names: Sequence[str] | None = None) -> Path:
    """A local folder with the artifact's files (all of them, or `names`), each checked for size and SHA-256.

    A local store's own folder, to be read only; of an S3 store, a copy under `cache.root()`, which several processes
    may ask for at once, and which is checked again before it is reused.
    Raises: UserError that names each file which is missing, different or (in a local folder) not of the artifact.
    """
    where = store.url(artifact.path)
    wanted = artifact.files if names is None else {}
    for name in names or ():
        if name not in artifact.files:
            raise UserError(f"{where}: expected a file {name!r}, found {', '.join(artifact.files) or 'none'}")
        wanted[name] = artifact.files[name]
    if not store.is_local:
        folder, wrong = cached(store, artifact.path, artifact.files, wanted)
    else:
        folder = Path(where)
        wrong = differences(folder, wanted)
        if names is None:
            wrong |= _strangers(folder, wanted)
    if wrong:
        raise _damaged(store, artifact, wrong, len(wanted))
    return folder


def verify(store: Store, artifact: Artifact) -> None:
    """See that the artifact's files are what was committed, wherever they lie, without a copy of them.

    Raises: UserError that names each file which is missing or different.
    """
    found = set(store.list(artifact.path))
    wrong: dict[str, str] = {}

    def compare(name: str) -> None:
        expected = artifact.files[name]
        if name not in found:
            wrong[name] = f"expected {expected['size_bytes']} bytes, found no file"
            return
        size, digest = store.digest(f"{artifact.path}/{name}")
        if size != expected["size_bytes"]:
            wrong[name] = f"expected {expected['size_bytes']} bytes, found {size}"
        elif digest != expected["sha256"]:
            wrong[name] = f"expected SHA-256 {expected['sha256']}, found {digest}"

    each(compare, artifact.files, FILES_AT_ONCE)
    if wrong:
        raise _damaged(store, artifact, dict(sorted(wrong.items())), len(artifact.files))


def _damaged(store: Store, artifact: Artifact, wrong: Mapping[str, str], num_files: int) -> UserError:
    lines = "".join(f"\n  {name}: {text}" for name, text in wrong.items())
    return UserError(
        f"{store.url(artifact.path)}: {len(wrong)} of {num_files} files are not what was committed; "
        f"{_remedy(store, artifact.stage, artifact.key)}{lines}"
    )


def _strangers(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Files that nobody committed, which a loader might pick up; hidden ones are the file system's or a viewer's."""
    extra = [n for n in files_under(folder) if n not in files and n != MANIFEST and not Path(n).name.startswith(".")]
    return dict.fromkeys(extra, "expected no such file")
