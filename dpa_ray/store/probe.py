"""Can a store do all that a run asks of it? Tried on an object of its own, of which nothing stays."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpa_ray.errors import UserError
from dpa_ray.store.fs import Store

PREFIX = "probe-"
"""Of the folder that a probe makes in the store, and deletes."""

_ADVICE = ". A run lists, reads, writes and deletes there: see that these credentials may, and that there is room"

OPERATIONS = ("reach", "write", "read", "list", "conditional put", "delete")


@dataclass(frozen=True)
class Tried:
    """What came of one operation."""

    operation: str  # one of OPERATIONS
    is_ok: bool
    detail: str = ""
    is_risk: bool = False  # it works, but not as well as it should


def probe(store: Store, *, reach: bool = True) -> list[Tried]:
    """Reach (if asked), write, read, list, put on condition and delete, in this order; what needs one that failed is left out.

    A local folder that was not there is not there afterwards. An S3 server that does not answer is given up after
    about 20 s.
    """
    made = _absent_folders(store)
    try:
        return _tried(store, f"{PREFIX}{uuid.uuid4().hex}", reach)
    finally:
        for folder in made:
            with suppress(OSError):  # another process has put something there meanwhile
                folder.rmdir()


def check(store: Store) -> list[str]:
    """What is at risk in a store that was reached (`Store.check`). Raises: UserError with the first operation that it
    refuses. Each waits as the store's calls do."""
    tried = probe(store, reach=False)
    for each in tried:
        if not each.is_ok:
            raise UserError(f"the store cannot {each.operation}: {each.detail}")
    return [each.detail for each in tried if each.is_risk]


def _tried(store: Store, folder: str, reach: bool) -> list[Tried]:
    path, data = f"{folder}/object", os.urandom(64)
    found: list[Tried] = []

    def attempt(operation: str, action: Callable[[], object]) -> bool:
        try:
            answer = action()
            result = answer if isinstance(answer, Tried) else Tried(operation, True)
        except FileNotFoundError as err:
            missing = "a place to write to" if operation == "write" else "what was just written"
            result = Tried(
                operation, False, f"{store.url(path)}: expected {missing}, found none ({err.strerror}){_ADVICE}"
            )
        except UserError as err:
            result = Tried(operation, False, f"{err}{'' if operation == 'reach' else _ADVICE}")
        found.append(result)
        return result.is_ok

    def read() -> Tried | None:
        back = store.read_bytes(path)
        if back == data:
            return None
        told = f"{store.url(path)}: expected the {len(data)} bytes that were written, found {len(back)} others"
        return Tried("read", False, told)

    def listed() -> Tried | None:
        names = store.list(folder)
        if names == ["object"]:
            return None
        return Tried("list", False, f"{store.url(folder)}: expected object, which was just written, found {names}")

    def conditional() -> Tried | None:
        if store.put_if_absent(path, b"another") or not store.put_if_absent(f"{folder}/second", data):
            told = f"{store.url(path)}: expected a conditional write to spare a file that is there, and to make one that is not"
            return Tried("conditional put", False, told)
        if store.honours_conditions(path):
            return None
        told = (
            f"{store.uri}: the server ignores If-None-Match: of two runs with one name that start within milliseconds, both "
            "may go on. Do not start the same run twice at once, or take a server that honours it"
        )
        return Tried("conditional put", True, told, is_risk=True)

    def delete() -> Tried | None:
        store.delete(folder)
        left = store.list(folder)
        return Tried("delete", False, f"{store.url(folder)}: expected it gone, found {left}{_ADVICE}") if left else None

    if reach and not attempt("reach", lambda: store.check(write=False)):
        return found
    if not attempt("write", lambda: store.write_bytes(path, data)):
        with suppress(UserError):  # an answer that was lost may hide a write that was made
            store.delete(folder)
        return found
    attempt("read", read)
    attempt("list", listed)
    attempt("conditional put", conditional)
    attempt("delete", delete)
    return found


def _absent_folders(store: Store) -> list[Path]:
    """The folders that a local store's first write makes, the deepest first."""
    if not store.is_local:
        return []
    root = Path(store.uri)
    return [folder for folder in (root, *root.parents) if not folder.exists()]
