"""Where the state of a stage under way is kept: checkpoints/<stage>-<key>/step-<number>-<attempt>, manifest last.

A folder without a manifest is what a killed process left: never resumed from, and removed by whoever saves next. The
key is the stage's own, so that any run that needs this stage goes on where another one stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpa_ray.errors import BrokenJson, UserError
from dpa_ray.store.cache import cached, forget
from dpa_ray.store.digests import differences
from dpa_ray.store.fs import Store, checked_path

MANIFEST = "manifest.json"
SCHEMA = 1

_log = logging.getLogger(__name__)


class Files(Protocol):
    """What is asked of a store, or of one that waits for a server that is away."""

    def url(self, path: str) -> str: ...
    def read_json(self, path: str) -> Any: ...
    def write_json(self, path: str, value: Any) -> None: ...
    def list_dirs(self, path: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...


class Damaged(UserError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole one. `manifest` holds schema, stage, key, step, files and what its writer needs besides."""

    path: str  # its folder in the store
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        step: int = self.manifest["step"]
        return step


def folder(stage: str, key: str) -> str:
    """Of all checkpoints of an artifact's stage and key."""
    return f"checkpoints/{stage}-{key}"


def path_of(stage: str, key: str, step: int, attempt: str) -> str:
    """A new checkpoint's own; `attempt` keeps apart what two processes write of the same step."""
    return f"{folder(stage, key)}/step-{step:08d}-{attempt}"


def finish(store: Files, path: str, stage: str, key: str, step: int, rest: Mapping[str, Any]) -> None:
    """Write the manifest, once everything else is there. `rest` has at least "files": {name: {size_bytes, sha256}}."""
    manifest = {"schema": SCHEMA, "stage": stage, "key": key, "step": step, **rest}
    store.write_json(f"{path}/{MANIFEST}", {**manifest, "digest": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def whole_ones(store: Files, stage: str, key: str) -> list[Checkpoint]:
    """The checkpoints with a manifest, latest first. One whose manifest cannot be read is left out, with a warning."""
    found = []
    for name in store.list_dirs(folder(stage, key)):
        path = f"{folder(stage, key)}/{name}"
        try:
            manifest = store.read_json(f"{path}/{MANIFEST}")
        except FileNotFoundError:
            continue
        except BrokenJson as err:
            problem: str | None = str(err)
        else:
            problem = _problem(manifest, stage, key, name)
        if problem is not None:
            _log.warning("%s: this checkpoint is passed over: %s", store.url(f"{path}/{MANIFEST}"), problem)
            continue
        found.append(Checkpoint(path, manifest))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path), reverse=True)


def _problem(manifest: Any, stage: str, key: str, name: str) -> str | None:
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        return f"expected the manifest of a checkpoint of schema {SCHEMA}, found something else"
    if (manifest.get("stage"), manifest.get("key")) != (stage, key):
        return f"expected a checkpoint of {stage}-{key}, found one of {manifest.get('stage')}-{manifest.get('key')}"
    if manifest.get("digest") != _digest(manifest):
        return "its content is not what was written: its own SHA-256 is another"
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 1 or not isinstance(files, dict):
        return f"expected step and files, found step {step!r} and files {type(files).__name__}"
    if not name.startswith(f"step-{step:08d}-"):
        return f"expected the manifest of {name}, found that of step {step}"
    for file, entry in files.items():
        try:
            checked_path(file)
        except ValueError as err:
            return f"in its files, {err}"
        size, digest = (entry.get("size_bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
            return f"expected size_bytes and sha256 of {file!r}, found {entry!r}"
    return None


def fetch(store: Store, checkpoint: Checkpoint, names: Sequence[str]) -> Path:
    """A local folder with the files `names`, each checked for size and SHA-256.

    Raises: Damaged that names each file which is missing or different; what the store raises where it is away.
    """
    files = checkpoint.manifest["files"]
    absent = [name for name in names if name not in files]
    if absent:
        raise Damaged(f"{store.url(checkpoint.path)}: expected {', '.join(absent)} among its files, found none")
    wanted = {name: files[name] for name in names}
    if store.is_local:
        place = Path(store.url(checkpoint.path))
        wrong = differences(place, wanted)
    else:
        place, wrong = cached(store, checkpoint.path, files, wanted)
    if wrong:
        lines = "; ".join(f"{name}: {text}" for name, text in wrong.items())
        raise Damaged(f"{store.url(checkpoint.path)}: {lines}")
    return place


def collect(store: Files, stage: str, key: str, *, keep: int, newest: str) -> None:
    """Remove all but the `keep` latest whole checkpoints up to `newest` (a path), and what is not whole.

    Those after `newest` go too: training went on from before them, as they could not be read. The caller is the only one
    who saves under this key.
    """
    whole = [checkpoint.path for checkpoint in whole_ones(store, stage, key)]
    kept = {newest, *whole[whole.index(newest) if newest in whole else 0 :][:keep]}
    for name in store.list_dirs(folder(stage, key)):
        path = f"{folder(stage, key)}/{name}"
        if path not in kept:
            # the manifest first: a removal that is broken off must not leave what looks whole
            store.delete(f"{path}/{MANIFEST}")
            store.delete(path)


def drop(store: Files, stage: str, key: str) -> None:
    """Remove all of a stage's, which is finished."""
    for name in store.list_dirs(folder(stage, key)):
        store.delete(f"{folder(stage, key)}/{name}/{MANIFEST}")
    store.delete(folder(stage, key))
    forget(folder(stage, key))
