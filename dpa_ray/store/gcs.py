"""How a prefix of a Google Cloud Storage bucket serves as a store: writes on condition of a generation, pinned reads."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dpa_ray.errors import NoAnswer
from dpa_ray.store.gcs_client import Answer, Refused, arrow_filesystem, call
from dpa_ray.store.local import TMP_PREFIX, whole_file
from dpa_ray.store.s3_client import Patience
from dpa_ray.store.threads import each

PART_BYTES = 16 << 20
"""One request of a download, and the largest file that is uploaded by one."""
UPLOAD_BYTES = 64 << 20
"""One request of a longer upload: a multiple of 256 KiB, as the API wants it."""
NAMES_AT_ONCE = 1000
"""One page of a listing, at most."""
THREADS_PER_FILE = 4
CALLS_AT_ONCE = 8
ABSENT = 0
"""The generation of an object that is not there."""


@dataclass(frozen=True)
class GcsFolder:
    """The store's operations under gs://bucket/prefix. Paths are relative to it and already checked.

    An object appears as a whole when its upload is finished, and never before.
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

    def _object(self, key: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{quote(key, safe='')}"

    def check(self, write: bool) -> None:
        params = {"prefix": self._start(""), "maxResults": 1}
        call("GET", f"/storage/v1/b/{self.bucket}/o", params=params, patience="quick")
        probe = f"{TMP_PREFIX}check-{uuid.uuid4().hex}"
        if write:
            self._put(self.key(probe), b"dpa_ray")
        try:
            # Arrow finds its account by itself: where it cannot, better now than in the middle of a stage
            arrow_filesystem().get_file_info(f"{self.bucket}/{self.key(probe)}")
        finally:
            if write:
                self._delete(self.key(probe))

    def exists(self, path: str) -> bool:
        try:
            call("GET", self._object(self.key(path)), params={"fields": "name"}, patience=self.patience)
        except Refused as err:
            if err.status != 404 or err.no_bucket:
                raise
            return False
        return True

    def read_bytes(self, path: str) -> bytes:
        return call("GET", self._object(self.key(path)), params={"alt": "media"}, patience=self.patience).body

    def _parts(self, path: str) -> tuple[int, dict[str, Any]]:
        """(size, parameters that read the version that is there now, whatever is written meanwhile)."""
        found = call(
            "GET", self._object(self.key(path)), params={"fields": "size,generation"}, patience=self.patience
        ).json()
        return int(found["size"]), {"alt": "media", "generation": found["generation"]}

    def _part(self, path: str, pinned: dict[str, Any], start: int, size: int) -> bytes:
        wanted = {"Range": f"bytes={start}-{start + size - 1}"}
        body = call("GET", self._object(self.key(path)), params=pinned, headers=wanted, patience=self.patience).body
        if len(body) != size:
            where = f"gs://{self.bucket}/{self.key(path)}"
            raise NoAnswer(f"{where}: expected {size} bytes from {start} on, received {len(body)}; run again")
        return body

    def digest(self, path: str) -> tuple[int, str]:
        digest = hashlib.sha256()
        size, pinned = self._parts(path)
        for start in range(0, size, PART_BYTES):
            digest.update(self._part(path, pinned, start, min(PART_BYTES, size - start)))
        return size, digest.hexdigest()

    def write_bytes(self, path: str, data: bytes) -> None:
        self._put(self.key(path), data)

    def _put(self, key: str, data: bytes, **condition: int) -> Answer:
        """The object by one request of two parts: only these are held to their condition by every server."""
        boundary = uuid.uuid4().hex
        about = json.dumps({"name": key})
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n"
        head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        return call(
            "POST", f"/upload/storage/v1/b/{self.bucket}/o", params={"uploadType": "multipart", **condition},
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            body=head.encode() + data + f"\r\n--{boundary}--\r\n".encode(), patience=self.patience,
        )  # fmt: skip

    def put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            self._put(self.key(path), data, ifGenerationMatch=ABSENT)
        except Refused as err:
            if err.status != 412:
                raise
            # a repeated request may have met its own first attempt, whose answer was lost
            return err.repeated and self.read_bytes(path) == data
        return True

    def honours_conditions(self, path: str) -> bool:
        try:
            self._put(self.key(path), b"", ifGenerationMatch=ABSENT)
        except Refused as err:
            if err.status == 412:
                return True
            raise
        return False

    def files(self, path: str, recursive: bool) -> list[str]:
        start = self._start(path)
        pages = self._pages(start, "" if recursive else "/")
        names = [item["name"].removeprefix(start) for page in pages for item in page.get("items", ())]
        files = (name for name in names if name and not name.endswith("/"))  # the empty objects that mark folders
        return sorted(n for n in files if not any(part.startswith(TMP_PREFIX) for part in n.split("/")))

    def folders(self, path: str) -> list[str]:
        start = self._start(path)
        names = [
            p.removeprefix(start).rstrip("/") for page in self._pages(start, "/") for p in page.get("prefixes", ())
        ]
        return sorted(name for name in names if not name.startswith(TMP_PREFIX))

    def _pages(self, start: str, delimiter: str) -> Iterator[dict[str, Any]]:
        params: dict[str, Any] = {
            "prefix": start,
            "fields": "nextPageToken,prefixes,items(name)",
            "maxResults": NAMES_AT_ONCE,
        }
        if delimiter:
            params["delimiter"] = delimiter
        while True:
            page = call("GET", f"/storage/v1/b/{self.bucket}/o", params=params, patience=self.patience).json()
            yield page
            if not page.get("nextPageToken"):
                return
            params["pageToken"] = page["nextPageToken"]

    def delete(self, path: str) -> None:
        below = [item["name"] for page in self._pages(self._start(path), "") for item in page.get("items", ())]
        each(self._delete, [*below, self.key(path)], CALLS_AT_ONCE)

    def _delete(self, key: str) -> None:
        try:
            call("DELETE", self._object(key), patience=self.patience)
        except Refused as err:
            if err.status != 404 or err.no_bucket:
                raise

    def put_file(self, source: Path, path: str) -> None:
        size = source.stat().st_size
        if size <= PART_BYTES:
            self._put(self.key(path), source.read_bytes())
            return
        params = {"uploadType": "resumable", "name": self.key(path)}
        begun = call("POST", f"/upload/storage/v1/b/{self.bucket}/o", params=params, patience=self.patience)
        place = {name.lower(): value for name, value in begun.headers.items()}["location"]
        with source.open("rb") as file:
            start = 0
            while True:
                file.seek(start)
                data = file.read(UPLOAD_BYTES)  # sent again after a lost answer, it is passed over
                headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}"}
                answer = call("PUT", place, headers=headers, body=data, patience=self.patience, also=frozenset({308}))
                if answer.status != 308:
                    return
                kept = _kept_bytes(answer.headers)  # the server may have taken a part of it only
                if kept <= start:
                    raise NoAnswer(
                        f"{self.bucket}/{self.key(path)}: the server has kept {kept} of {size} bytes, and none of those from "
                        f"{start} on that were sent again"
                    )
                start = kept

    def get_file(self, path: str, target: Path) -> None:
        size, pinned = self._parts(path)
        with whole_file(target, durable=False) as file:

            def part(start: int) -> None:
                data = memoryview(self._part(path, pinned, start, min(PART_BYTES, size - start)))
                while data:  # a write to a full disk is cut short before it fails
                    start += (written := os.pwrite(file.fileno(), data, start))
                    data = data[written:]

            each(part, range(0, size, PART_BYTES), THREADS_PER_FILE)

    def copy(self, source: str, target: str) -> None:
        names = self.files(source, True)
        pairs = [(f"{source}/{name}", f"{target}/{name}") for name in names] or [(source, target)]

        def copy_one(pair: tuple[str, str]) -> None:
            onto = f"/rewriteTo/b/{self.bucket}/o/{quote(self.key(pair[1]), safe='')}"
            params: dict[str, Any] = {}
            while True:
                done = call("POST", self._object(self.key(pair[0])) + onto, params=params, patience="long").json()
                if done.get("done", True):
                    return
                params["rewriteToken"] = done["rewriteToken"]

        each(copy_one, pairs, THREADS_PER_FILE)

    def arrow(self) -> tuple[Any, str]:
        return arrow_filesystem(), "/".join(part for part in (self.bucket, self.prefix) if part)


def _kept_bytes(headers: dict[str, str]) -> int:
    """How many bytes of an upload the server says that it has: `Range: bytes=0-N`, or no header where it has none."""
    found = {name.lower(): value for name, value in headers.items()}.get("range", "")
    return int(found.rpartition("-")[2]) + 1 if found else 0
