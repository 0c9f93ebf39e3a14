"""How a prefix of an S3 bucket serves as a store: conditional, streamed and server-side operations."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.errors import NoAnswer
from dpa_ray.store.local import TMP_PREFIX, whole_file
from dpa_ray.store.messages import NOT_FOUND, client_error
from dpa_ray.store.s3_client import Patience, arrow_filesystem, client
from dpa_ray.store.threads import each

PART_BYTES = 16 << 20
"""One request of an upload or download; a file needs at most THREADS_PER_FILE of them in memory."""
THREADS_PER_FILE = 4
COPY_WHOLE_BYTES = 4 << 30
"""Larger objects are copied in parts; S3 copies at most 5 GiB in one request, and small servers know no part copy."""
COPY_PART_BYTES = 256 << 20
READ_ATTEMPTS = 4
DELETES_AT_ONCE = 8


@dataclass(frozen=True)
class S3Folder:
    """The store's operations under s3://bucket/prefix. Paths are relative to it and already checked.

    Uploads go through boto3: when a write through Arrow's stream is broken off by an exception, what was written
    until then becomes the object. An upload that dies, or whose process does, shows nothing.
    """

    bucket: str
    prefix: str
    patience: Patience = "usual"

    def key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path) if part)

    def _start(self, path: str) -> str:
        """What the keys of all files under `path` begin with."""
        key = self.key(path)
        return f"{key}/" if key else ""

    def check(self, write: bool) -> None:
        s3 = client("quick")
        # unlike a HEAD of the bucket, the answer says what is wrong, and rights on the prefix alone are enough
        s3.list_objects_v2(Bucket=self.bucket, Prefix=self._start(""), MaxKeys=1)
        probe = self.key(f"{TMP_PREFIX}check-{uuid.uuid4().hex}")
        if write:
            s3.put_object(Bucket=self.bucket, Key=probe, Body=b"dpa_ray")
        try:
            # Arrow finds its credentials by itself: where it cannot, better now than in the middle of a stage
            arrow_filesystem(self.bucket).get_file_info(f"{self.bucket}/{probe}")
        finally:
            if write:
                s3.delete_object(Bucket=self.bucket, Key=probe)

    def exists(self, path: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            client(self.patience).head_object(Bucket=self.bucket, Key=self.key(path))
        except ClientError as err:
            code, status = client_error(err)
            if code in NOT_FOUND or status == 404:
                return False
            raise
        return True

    def read_bytes(self, path: str) -> bytes:
        # one GET, not Arrow's HEAD and ranged GETs, which mix two versions if the object is replaced in between
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(READ_ATTEMPTS):
            try:
                body = client(self.patience).get_object(Bucket=self.bucket, Key=self.key(path))["Body"]
                data: bytes = body.read()
                return data
            except (HTTPClientError, IncompleteReadError):  # broken off in the middle: botocore does not repeat that
                if attempt == READ_ATTEMPTS - 1:
                    raise
        raise AssertionError("not reached")

    def digest(self, path: str) -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        with arrow_filesystem(self.bucket).open_input_stream(f"{self.bucket}/{self.key(path)}") as stream:
            while data := stream.read(PART_BYTES):
                size += len(data)
                digest.update(data)
        return size, digest.hexdigest()

    def write_bytes(self, path: str, data: bytes) -> None:
        client(self.patience).put_object(Bucket=self.bucket, Key=self.key(path), Body=data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        if self.exists(path):  # decides alone on a server that ignores If-None-Match
            return False
        try:
            client(self.patience).put_object(Bucket=self.bucket, Key=self.key(path), Body=data, IfNoneMatch="*")
        except ClientError as err:
            code, status = client_error(err)
            if code == "ConditionalRequestConflict" or status == 409:  # two writers at once: the other one is ahead
                return False
            if code != "PreconditionFailed" and status != 412:
                raise
            # a repeated request may have met its own first attempt, whose answer was lost
            repeated = err.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
            return repeated and self.read_bytes(path) == data
        return True

    def honours_conditions(self, path: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            client(self.patience).put_object(Bucket=self.bucket, Key=self.key(path), Body=b"", IfNoneMatch="*")
        except ClientError as err:
            code, status = client_error(err)
            if code in ("PreconditionFailed", "ConditionalRequestConflict") or status in (409, 412):
                return True
            raise
        return False

    def files(self, path: str, recursive: bool) -> list[str]:
        start = self._start(path)
        names = [key.removeprefix(start) for key in self._keys(start, recursive)]
        return sorted(n for n in names if not any(part.startswith(TMP_PREFIX) for part in n.split("/")))

    def _keys(self, start: str, recursive: bool) -> Iterator[str]:
        options = {} if recursive else {"Delimiter": "/"}
        for page in (
            client(self.patience).get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start, **options)
        ):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # the empty object by which some tools mark a folder
                    yield entry["Key"]

    def folders(self, path: str) -> list[str]:
        start = self._start(path)
        names = []
        for page in (
            client(self.patience)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=start, Delimiter="/")
        ):
            names += [p["Prefix"].removeprefix(start).rstrip("/") for p in page.get("CommonPrefixes", ())]
        return sorted(name for name in names if not name.startswith(TMP_PREFIX))

    def delete(self, path: str) -> None:
        s3, below = client(self.patience), self._all(self._start(path))
        if not below or self.exists(path):  # rclone answers with an error where the name is a folder only
            s3.delete_object(Bucket=self.bucket, Key=self.key(path))
        # one request each: servers disagree on the checksum that the request for many must carry
        each(lambda key: s3.delete_object(Bucket=self.bucket, Key=key), below, DELETES_AT_ONCE)
        self._drop_markers(path)

    def _drop_markers(self, path: str) -> None:
        """Delete empty objects named like the folders above `path`, up to the store's own: Arrow leaves them where Ray makes
        a folder, and tools that copy a prefix stumble over them. What is above the store is others'."""
        parents = self.key(path).split("/")[:-1]
        own = len(self.prefix.split("/")) if self.prefix else 1
        for depth in range(len(parents), own - 1, -1):
            marker = "/".join(parents[:depth]) + "/"
            found = (
                client(self.patience).list_objects_v2(Bucket=self.bucket, Prefix=marker, MaxKeys=1).get("Contents", ())
            )
            if found and found[0]["Key"] == marker and found[0]["Size"] == 0:
                client(self.patience).delete_object(Bucket=self.bucket, Key=marker)

    def _all(self, start: str) -> list[str]:
        pages = client(self.patience).get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def put_file(self, source: Path, path: str) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=THREADS_PER_FILE,
            preferred_transfer_client="classic",
        )
        client(self.patience).upload_file(str(source), self.bucket, self.key(path), Config=config)

    def get_file(self, path: str, target: Path) -> None:
        source = arrow_filesystem(self.bucket).open_input_file(f"{self.bucket}/{self.key(path)}")
        with source, whole_file(target, durable=False) as file:
            size = source.size()

            def part(start: int) -> None:
                expected = min(PART_BYTES, size - start)
                data = memoryview(source.read_at(expected, start))
                if len(data) != expected:
                    where = f"s3://{self.bucket}/{self.key(path)}"
                    raise NoAnswer(
                        f"{where}: expected {expected} bytes from {start} on, received {len(data)}; run again"
                    )
                while data:  # a write to a full disk is cut short before it fails
                    start += (written := os.pwrite(file.fileno(), data, start))
                    data = data[written:]

            each(part, range(0, size, PART_BYTES), THREADS_PER_FILE)

    def copy(self, source: str, target: str) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=COPY_WHOLE_BYTES,
            multipart_chunksize=COPY_PART_BYTES,
            max_concurrency=THREADS_PER_FILE,
            preferred_transfer_client="classic",
        )
        names = self.files(source, True)
        pairs = [(f"{source}/{name}", f"{target}/{name}") for name in names] or [(source, target)]

        def copy_one(pair: tuple[str, str]) -> None:
            origin = {"Bucket": self.bucket, "Key": self.key(pair[0])}
            client("long").copy(origin, self.bucket, self.key(pair[1]), Config=config)

        each(copy_one, pairs, THREADS_PER_FILE)

    def arrow(self) -> tuple[Any, str]:
        return arrow_filesystem(self.bucket), "/".join(part for part in (self.bucket, self.prefix) if part)
