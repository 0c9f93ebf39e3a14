"""A hub on loopback: repositories of small files at commits, as much of its API as its client asks for, and its failures."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class HubServer:
    """Use as a context manager. A revision is a commit, or a branch or tag of `refs`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # by name and commit: files by path
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []  # method and path
        self.failing = 0  # a status: everything is answered so
        self.num_failures: int | None = None  # so many answers, None: all
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str, files: Path | dict[str, bytes], branch: str = "main") -> str:
        """A new commit of `name`, which `branch` stands at from now on; earlier ones stay."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        commits = self.repos.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()  # noqa: S324
        commits[commit] = files
        self.refs.setdefault(name, {})[branch] = commit
        return commit

    def downloads(self, file: str) -> int:
        """How often a file's content was asked for."""
        return sum(asked.startswith("GET ") and asked.endswith(f"/{file}") for asked in self.asked)

    def fails(self) -> int:
        """The status to answer with instead, or 0."""
        with self._lock:
            if not self.failing or self.num_failures == 0:
                return 0
            if self.num_failures is not None:
                self.num_failures -= 1
            return self.failing


@contextmanager
def hub_of(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process's client asks, with an empty cache in `folder`."""
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import _http

    from dpa_ray.stages import hub

    with HubServer() as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        # the client itself tries six times, for 23 s: here without waiting
        patch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _s: None}))
        hub._fetched.cache_clear()
        yield server
        hub._fetched.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if status := hub.fails():
            return self._answer(status)
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = "/".join(parts[:2])
        if name in hub.gated:
            return self._answer(403, headers={"X-Error-Code": "GatedRepo"})
        if name not in hub.repos:
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        what, revision = (parts[2], parts[3]) if len(parts) > 3 else ("revision", "main")
        commit = hub.refs[name].get(revision, revision)
        files = hub.repos[name].get(commit)
        if files is None:
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if not is_api:
            return self._file(files, "/".join(parts[4:]), commit)
        if what == "tree":
            listed: Any = [
                {"type": "file", "path": p, "size": len(data), "oid": _oid(data)} for p, data in files.items()
            ]
        else:
            listed = {"id": name, "sha": commit, "siblings": [{"rfilename": p} for p in files]}
        return self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        at = {"X-Repo-Commit": commit}
        if path not in files:
            return self._answer(404, headers={**at, "X-Error-Code": "EntryNotFound"})
        return self._answer(200, files[path], {**at, "ETag": f'"{_oid(files[path])}"'})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # noqa: S324
