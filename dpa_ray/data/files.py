"""How are a source's files reached? A URI's file system, and a folder of images by names; local or S3."""

from __future__ import annotations

import errno
import functools
import os
import posixpath
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pyarrow import fs

from dpa_ray.credentials import has_credentials, without_credentials
from dpa_ray.data.retry import first_line, is_outage, retried
from dpa_ray.errors import UserError

T = TypeVar("T")

MISSING = -1
"""Size of a file that is not there."""

# Of the client itself, within each try of `retried`: so that a server that refuses is told within a second or two.
_CONNECT_S, _STALLED_S, _ATTEMPTS = 5, 30, 3
_LIST_FROM = 64  # names in one S3 folder from which listing it takes fewer calls than asking for each
_ABSENT = (
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
    errno.ENXIO,  # a socket
)  # fmt: skip


def open_uri(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path in it) of a local path, file://, s3:// or gs:// URI. Raises: UserError for other schemes."""
    if uri.startswith("s3://"):
        path = uri.removeprefix("s3://").strip("/")
        if not path:
            raise UserError(f"expected s3://BUCKET/PATH, found {without_credentials(uri)!r}")
        return _s3(path.split("/")[0], os.getpid(), *(os.environ.get(n) for n in _S3_NAMES)), path
    if uri.startswith("gs://"):
        path = uri.removeprefix("gs://").strip("/")
        if not path:
            raise UserError(f"expected gs://BUCKET/PATH, found {without_credentials(uri)!r}")
        return _gcs(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST")), path
    if uri.startswith("file://"):
        uri = unquote(uri.removeprefix("file://"))
    if "://" in uri:
        raise UserError(f"expected a local path, file://, s3:// or gs:// URI, found {without_credentials(uri)!r}")
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def asked(uri: str, ask: Callable[[Any, str], T]) -> T:
    """`ask(file system, path)` of a URI; an outage of S3 only delays it. Raises: OSError; UserError."""
    return retried(lambda: ask(*open_uri(uri)), uri)


def is_remote(uri: str) -> bool:
    """Is it in a bucket, whose server may be away?"""
    return uri.startswith(("s3://", "gs://"))


def absolute(uri: str) -> str:
    """`uri`, a local path made absolute, so that it means the same in any process; without a slash at its end."""
    uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())
    return uri.rstrip("/") or "/"


_S3_NAMES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, _pid: int, s3_url: str | None, url: str | None, *rest: str | None) -> Any:
    """One client for a process and environment (it does not survive a fork)."""
    region, ca_file = rest[0] or rest[1], rest[2]
    endpoint = s3_url or url
    options: dict[str, Any] = {}
    if endpoint:
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            os.environ.setdefault(name, "when_required")  # Ceph and rclone answer 411 to what the default sends
        scheme, _, host = endpoint.partition("://")
        if scheme not in ("http", "https") or not host.strip("/") or has_credentials(endpoint):
            raise UserError(
                f"AWS_ENDPOINT_URL: expected http://HOST[:PORT] or https://HOST[:PORT], found {without_credentials(endpoint)!r}"
            )
        options = {"scheme": scheme, "endpoint_override": host.rstrip("/")}
    elif not region:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError as err:
            if is_outage(err):
                raise
            raise UserError(f"s3://{bucket}: expected a bucket that can be reached, found none: {err}") from None
    return fs.S3FileSystem(
        region=region or "us-east-1",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_S,
        request_timeout=_STALLED_S,
        tls_ca_file_path=ca_file,
        **options,
    )


@functools.lru_cache(maxsize=2)
def _gcs(_pid: int, emulator: str | None) -> Any:
    """Google Cloud Storage with this machine's account; an emulator (as Google's own clients are told of one) without."""
    limit = timedelta(seconds=_STALLED_S / 3)  # of the client itself, within each try of `retried`
    if not emulator:
        return fs.GcsFileSystem(retry_time_limit=limit)
    scheme, _, host = (emulator if "://" in emulator else f"http://{emulator}").partition("://")
    return fs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=host.rstrip("/"), retry_time_limit=limit)


def unsafe_name(name: str) -> str | None:
    """Why `name` may not name an image of a folder, or None where it may."""
    if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]*://|data:|\\", name):
        return "expected a path relative to the image folder, found an absolute one"
    if ".." in re.split(r"[\\/]", name):
        return "expected a path inside the image folder, found '..'"
    if "\0" in name:
        return "expected a file name, found a NUL character"
    return None


class Folder:
    """Images by their names relative to `uri`. Picklable: clients are made where they are needed."""

    def __init__(self, uri: str):
        self.uri = uri

    def check(self) -> None:
        """Raises: UserError where there is no such folder."""
        try:
            kind = asked(self.uri, lambda system, root: system.get_file_info(root).type)
        except OSError as err:
            raise UserError(f"{self.uri} cannot be read: {first_line(err)}") from None
        if kind != fs.FileType.Directory:
            found = "a file" if kind == fs.FileType.File else "nothing"
            raise UserError(f"expected a folder of images at {self.uri}, found {found}")

    def read(self, name: str) -> bytes:
        """The bytes of image `name`. Raises: FileNotFoundError; UserError where the folder cannot be read at all."""

        def fetch() -> bytes:
            system, root = open_uri(self.uri)
            path = f"{root}/{posixpath.normpath(name)}"
            return _read_local(path) if isinstance(system, fs.LocalFileSystem) else _read_stream(system, path)

        try:
            return retried(fetch, f"{self.uri}/{name}")
        except OSError as err:
            if isinstance(err, FileNotFoundError) or err.errno in _ABSENT:
                raise FileNotFoundError(first_line(err)) from None
            raise UserError(f"{self.uri}/{name} cannot be read: {first_line(err)}") from None

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of `names`, MISSING where there is no such file; in few calls.

        Raises: UserError where the folder cannot be read.
        """
        try:
            if is_remote(self.uri):
                return _remote_sizes(self.uri, names)
            _, root = open_uri(self.uri)
            return {name: _local_size(f"{root}/{name}") for name in names}
        except OSError as err:
            raise UserError(f"{self.uri} cannot be listed: {first_line(err)}") from None


def _read_stream(system: Any, path: str) -> bytes:
    with system.open_input_stream(path) as file:
        data: bytes = file.read()
        return data


def _read_local(path: str) -> bytes:
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:  # no waiting for a pipe
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", path)
        return file.read()


def _local_size(path: str) -> int:
    try:
        info = os.stat(path)
    except OSError as err:
        if err.errno in _ABSENT:
            return MISSING
        raise
    return info.st_size if stat.S_ISREG(info.st_mode) else MISSING


def _remote_sizes(uri: str, names: Iterable[str]) -> dict[str, int]:
    scheme, _, root = uri.rstrip("/").partition("://")
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[posixpath.dirname(posixpath.normpath(name))].append(name)
    sizes: dict[str, int] = {}
    for folder, members in by_folder.items():
        where = f"{root}/{folder}".rstrip("/")
        wanted: Any = fs.FileSelector(where, allow_not_found=True)
        if len(members) < _LIST_FROM:
            wanted = [f"{root}/{posixpath.normpath(name)}" for name in members]
        infos = asked(f"{scheme}://{where}", functools.partial(_infos, wanted))
        found = {info.path: info.size for info in infos if info.type == fs.FileType.File}
        for name in members:
            sizes[name] = found.get(f"{root}/{posixpath.normpath(name)}", MISSING)
    return sizes


def _infos(wanted: Any, system: Any, _path: str) -> list[Any]:
    infos: list[Any] = system.get_file_info(wanted)
    return infos
