"""Where files of an S3 artifact lie locally: a cache folder that processes share and nobody trusts unchecked."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpa_ray.store.digests import differences
from dpa_ray.store.fs import Store
from dpa_ray.store.local import TMP_PREFIX
from dpa_ray.store.messages import told

ENV_NAME = "DPA_RAY_CACHE"
LOCK_WAIT_S = 1800.0
"""How long one process waits while another fetches the same artifact, before it fetches for itself."""
LOCK_POLL_S = 0.1
LEFTOVER_AFTER_S = 24 * 3600.0

_log = logging.getLogger(__name__)


def root() -> Path:
    """The user's cache folder: DPA_RAY_CACHE, or ~/.cache/dpa_ray."""
    return Path(os.environ.get(ENV_NAME) or "~/.cache/dpa_ray").expanduser().absolute()


def cached(
    store: Store, path: str, files: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]
) -> tuple[Path, dict[str, str]]:
    """(local folder with the `wanted` ones of an artifact's `files`, what is wrong with those that are in the store).

    The folder is named after the files' digests, so that an artifact that was made anew gets another one.
    """
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    folder = root() / path.replace("/", "-") / digest
    with told(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        # looked at without the lock, and one lock for each set of files: a node's processes need not wait for each other
        if not differences(folder, wanted):
            return folder, {}
        which = hashlib.sha256("\0".join(sorted(wanted)).encode()).hexdigest()[:12]
        with _lock(folder.parent / f"{digest}-{which}.lock"):
            stale = differences(folder, wanted)
            if not stale:
                return folder, {}
            for name in stale:
                if (folder / name).exists():
                    _log.warning("%s: %s; fetching it again", folder / name, stale[name])
            _sweep(folder.parent)
            tmp = folder.parent / f"{TMP_PREFIX}{digest}-{uuid.uuid4().hex}"
            try:
                return folder, _fetch(store, path, {name: wanted[name] for name in stale}, tmp, folder)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)


def forget(path: str) -> None:
    """Remove the local copies of `path` of an S3 store, or of what was under it, which will not be asked for again."""
    name = path.replace("/", "-")
    for folder in [root() / name, *root().glob(f"{glob.escape(name)}-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(store: Store, path: str, files: Mapping[str, Mapping[str, Any]], tmp: Path, folder: Path) -> dict[str, str]:
    """Download `files` to `tmp` and, where all are right, move each into `folder`; returns what is wrong."""
    try:
        store.download(path, tmp, list(files))
    except FileNotFoundError:
        there = set(store.list(path))
        store.download(path, tmp, [name for name in files if name in there])
    wrong = differences(tmp, files)
    if not wrong:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(tmp / name, folder / name)  # to the same content, whoever else does it
    return wrong


def _sweep(folder: Path) -> None:
    """Remove downloads that killed processes left."""
    for left in folder.glob(f"{TMP_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFTOVER_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time in; it only saves double work. Freed by the system when its holder dies."""
    with open(path, "ab") as file:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    _log.warning("%s: still held after %.0f s; going on without it", path, LOCK_WAIT_S)
                    break
                time.sleep(LOCK_POLL_S)
            except OSError:  # a file system without locks
                break
        yield
