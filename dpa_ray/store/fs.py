"""How the rest of the code reads and writes a store: one class over a local folder or a prefix on S3 or Cloud Storage."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from dpa_ray.credentials import has_credentials, without_credentials
from dpa_ray.errors import BrokenJson, UserError
from dpa_ray.store import gcs_client
from dpa_ray.store.gcs import GcsFolder
from dpa_ray.store.local import LocalFolder, files_under
from dpa_ray.store.messages import told
from dpa_ray.store.s3 import S3Folder
from dpa_ray.store.s3_client import Patience, arrow_filesystem, configure_endpoint
from dpa_ray.store.threads import each

FILES_AT_ONCE = 4
Names = list[str]
T = TypeVar("T")
Through = Callable[[Callable[[], Any], str], Any]
"""Takes a call and the URL that it is about, and makes it, again where that helps; must be picklable."""


class _Backend(Protocol):
    """What a kind of store does; paths are checked, errors are the kind's own."""

    def check(self, write: bool) -> None: ...
    def exists(self, path: str) -> bool: ...
    def read_bytes(self, path: str) -> bytes: ...
    def digest(self, path: str) -> tuple[int, str]: ...
    def write_bytes(self, path: str, data: bytes) -> None: ...
    def put_if_absent(self, path: str, data: bytes) -> bool: ...
    def honours_conditions(self, path: str) -> bool: ...
    def files(self, path: str, recursive: bool) -> list[str]: ...
    def folders(self, path: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...
    def put_file(self, source: Path, path: str) -> None: ...
    def get_file(self, path: str, target: Path) -> None: ...
    def copy(self, source: str, target: str) -> None: ...
    def arrow(self) -> tuple[Any, str]: ...


class Store:
    """A folder tree at `uri`: an absolute local path or s3://bucket[/prefix] (AWS_ENDPOINT_URL is honoured).

    Paths are relative to it, with `/`. A write is atomic: a reader sees the old file or the new one, whole. Names that
    begin with `.tmp-` belong to the store itself and are never listed. Holds no client: it can be pickled, and each
    process makes its own.

    Raises, in every method: FileNotFoundError where a file is absent; UserError where the store cannot be reached or
    refuses (after some retries); ValueError for a path that leads out of the store.
    """

    def __init__(self, uri: str, *, through: Through | None = None, patience: Patience = "usual"):
        """
        Args:
            through: makes each call, and may wait for a server that is away and make it again: all of them can be.
            patience: of one call with a server that is slow or away.
        Raises: UserError where `uri` is neither an absolute local path nor s3://bucket[/prefix].
        """
        kind, place = _parse(uri)
        self.is_local = kind == "local"
        self._through, self._patience = through, patience
        self._backend: _Backend
        if self.is_local:
            self.uri, self._backend = place, LocalFolder(Path(place))
        else:
            bucket, _, prefix = place.partition("/")
            self.uri = f"{kind}://{place}"
            if kind == "gs":
                self._backend = GcsFolder(bucket, prefix, patience)
            else:
                configure_endpoint()
                self._backend = S3Folder(bucket, prefix, patience)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.uri, self._through, self._patience)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def url(self, path: str) -> str:
        """The full URI or local path of `path`."""
        path = checked_path(path, root_too=True)
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def brief(self) -> Store:
        """The same store for calls that must not take long: each fails after about 10 s without an answer."""
        return Store(self.uri, patience="brief")

    def _do(self, path: str, doing: str, call: Callable[[], T]) -> T:
        """Make `call`, which is `doing` something with `path`."""
        url = self.url(path)

        def once() -> T:
            with told(url, doing):
                return call()

        return once() if self._through is None else self._through(once, url)

    def check(self, *, write: bool = True) -> None:
        """See that the store can be read and, with `write`, written to (a local folder is then made).

        An absent local folder or S3 prefix is an empty store. An S3 server that does not answer is given up after
        about 20 s. Raises: UserError.
        """
        with told(self.uri):
            try:
                self._backend.check(write)
            except FileNotFoundError as err:  # under /proc, for one, no folder can be made
                raise UserError(f"{self.uri}: {err.strerror}; name a store that can be written to") from err

    def exists(self, path: str) -> bool:
        """Is `path` a file?"""
        return self._do(path, "looking for it", lambda: self._backend.exists(checked_path(path)))

    def read_bytes(self, path: str) -> bytes:
        """The whole file. Raises: FileNotFoundError."""
        return self._do(path, "reading", lambda: self._backend.read_bytes(checked_path(path)))

    def digest(self, path: str) -> tuple[int, str]:
        """(size in bytes, SHA-256) of a file, which is read to its end and kept nowhere. Raises: FileNotFoundError."""
        return self._do(path, "reading", lambda: self._backend.digest(checked_path(path)))

    def read_json(self, path: str) -> Any:
        """The value in a JSON file. Raises: FileNotFoundError; UserError where it is no JSON."""
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as err:
            raise BrokenJson(f"{self.url(path)}: expected JSON, found {len(data)} bytes that are none ({err})") from err

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file, or replace it."""
        self._do(path, "writing", lambda: self._backend.write_bytes(checked_path(path), data))

    def write_json(self, path: str, value: Any) -> None:
        """Write `value` as JSON. Raises: ValueError for NaN and infinities, TypeError for what JSON has not."""
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        self.write_bytes(path, f"{text}\n".encode())

    def append_line(self, path: str, line: str) -> None:
        """Append `line` and a newline to a local file; it is there when the call returns, and nothing of it where it fails.

        Raises: io.UnsupportedOperation on S3, which cannot append; ValueError for a line with a newline in it.
        """
        if not isinstance(self._backend, LocalFolder):
            raise io.UnsupportedOperation(f"{self.url(path)}: S3 cannot append to a file; write it whole")
        if "\n" in line:
            raise ValueError(f"expected one line, found {line!r}")
        with told(self.url(path), "writing"):
            self._backend.append_line(checked_path(path), line)

    def list(self, path: str, *, recursive: bool = True) -> Names:
        """Sorted names of the files under `path` (those directly in it unless `recursive`), relative to it."""
        return self._do(path, "listing", lambda: self._backend.files(checked_path(path, root_too=True), recursive))

    def list_dirs(self, path: str) -> Names:
        """Sorted names of the folders directly in `path`. (On S3, a folder is there while a file is in it.)"""
        return self._do(path, "listing", lambda: self._backend.folders(checked_path(path, root_too=True)))

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with all in it, if it is there."""
        self._do(path, "deleting", lambda: self._backend.delete(checked_path(path)))

    def upload(self, folder: Path, path: str, names: Sequence[str] | None = None) -> None:
        """Copy files of the local `folder` (all of them, or `names`) to `path`, a few at once, in no order."""

        def put(name: str) -> None:
            target = checked_path(f"{path}/{name}" if path else name)
            self._do(target, "writing", lambda: self._backend.put_file(folder / name, target))

        each(put, files_under(folder) if names is None else names, FILES_AT_ONCE)

    def download(self, path: str, folder: Path, names: Sequence[str] | None = None) -> None:
        """Copy files under `path` (all of them, or `names`) to the local `folder`, a few at once, in no order.

        Raises: FileNotFoundError where one of `names` is absent.
        """

        def get(name: str) -> None:
            source, target = checked_path(f"{path}/{name}" if path else name), folder / checked_path(name)
            self._do(source, "reading", lambda: self._backend.get_file(source, target))

        if names is None:
            names = self.list(path)
            for name in names:  # an S3 key may hold anything
                if not _is_inside(name):
                    raise UserError(
                        f"{self.url(path)}: found {name!r}, which cannot be the name of a local file; rename it"
                    )
        each(get, names, FILES_AT_ONCE)

    def copy(self, source: str, target: str) -> None:
        """Copy a file or folder inside the store: on the server in S3; by hard links of its big files locally.

        Files of `target` that `source` has not stay as they are. Raises: FileNotFoundError.
        """
        if checked_path(source) != checked_path(target):  # S3 refuses a copy onto itself
            self._do(source, f"copying to {self.url(target)}", lambda: self._backend.copy(source, target))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless it exists; of several writers at once, one gets True.

        A few S3 servers ignore conditional writes (rclone): there, two writers within milliseconds may both get True.
        """
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            made = self._backend.put_if_absent(checked_path(path), data)
            # an earlier try may have written it, though its answer was lost
            return made or (tries > 1 and self._backend.read_bytes(path) == data)

        return self._do(path, "writing", put)

    def honours_conditions(self, path: str) -> bool:
        """Does the store itself refuse a conditional write where `path`, a file, is? (One that does not replaces it.)"""
        return self._do(path, "writing", lambda: self._backend.honours_conditions(checked_path(path)))

    def arrow(self) -> tuple[Any, str]:
        """(pyarrow file system, root inside it): f"{root}/{path}" opens `path`.

        For reading, and for writers that cannot fail half-way: on S3, closing Arrow's stream after an exception
        publishes what was written so far.
        """
        return self._do("", "opening", lambda: self._backend.arrow())


def _opened(uri: str, through: Through | None, patience: Patience) -> Store:
    return Store(uri, through=through, patience=patience)


def open_uri(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path inside it) of a local path, file://, s3:// or gs:// URI.

    Raises: UserError for any other kind of URI.
    """
    if "://" not in uri:
        uri = str(Path(uri).expanduser().absolute())
    kind, place = _parse(uri)
    if kind == "local":
        from pyarrow import fs

        return fs.LocalFileSystem(), place
    with told(uri):
        if kind == "gs":
            return gcs_client.arrow_filesystem(), place
        return arrow_filesystem(place.partition("/")[0]), place


def checked_path(path: str, *, root_too: bool = False) -> str:
    """`path` itself. Raises: ValueError unless it is relative, without empty, `.` and `..` parts."""
    if path == "" and root_too:
        return path
    if not _is_inside(path):
        raise ValueError(f"expected a path inside the store such as 'runs/a/run.json', found {path!r}")
    return path


def _is_inside(path: str) -> bool:
    return not any(part in ("", ".", "..") for part in path.split("/")) and "\0" not in path


def _parse(uri: str) -> tuple[str, str]:
    """("local", absolute path) or ("s3" or "gs", "bucket" or "bucket/prefix")."""
    expected = "expected an absolute local path, s3://bucket/prefix or gs://bucket/prefix"
    if has_credentials(uri):
        raise UserError(
            f"{expected} without user and password; found {without_credentials(uri)!r}; see AWS_ACCESS_KEY_ID"
        )
    kind, _, place = uri.partition("://")
    if kind in ("s3", "gs") and "://" in uri:
        bucket, *parts = [part for part in place.split("/") if part] or [""]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", bucket):
            raise UserError(f"{expected}; found {uri!r}, which names no bucket (3 to 63 letters, digits, '.', '-')")
        if "." in parts or ".." in parts:
            raise UserError(f"{expected} without '.' and '..'; found {uri!r}")
        return kind, "/".join([bucket, *parts])
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    if "://" in path or not path.startswith("/"):
        raise UserError(f"{expected}; found {uri!r}")
    return "local", str(Path(path))
