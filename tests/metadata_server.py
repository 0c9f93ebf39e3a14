"""A metadata server on loopback that answers as AWS's (version 2) and Google's do, with what a test sets."""

from __future__ import annotations

import json
import secrets
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

INTERRUPTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
ROLES = "/latest/meta-data/iam/security-credentials/"
PREEMPTED, MAINTENANCE = "/computeMetadata/v1/instance/preempted", "/computeMetadata/v1/instance/maintenance-event"


class MetadataServer:
    """Use as a context manager. `values`: bodies by path; what is not there is a 404."""

    def __init__(self, cloud: str):
        self.cloud = cloud
        self.values: dict[str, str] = {}
        if cloud == "gcp":
            self.values = {"/computeMetadata/v1/instance/id": "1", PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
        self.changed = threading.Condition()
        self.tokens: set[str] = set()
        self.asked: list[str] = []  # method and path with query
        self.is_failing = False  # 503 to everything
        self.late_s: list[float] = []  # how long the next requests wait for their answers, in order
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> MetadataServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def say(self, path: str, value: str) -> None:
        """Change what a path answers; who waits for a change is answered."""
        with self.changed:
            self.values[path] = value
            self.changed.notify_all()

    def give_role(self, key: str, secret: str) -> None:
        """Credentials of an instance role."""
        lasting = {
            "AccessKeyId": key,
            "SecretAccessKey": secret,
            "Token": "token",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        self.say(ROLES, "role")
        self.say(f"{ROLES}role", json.dumps(lasting))

    def wait(self) -> None:
        if self.late_s:
            time.sleep(self.late_s.pop(0))

    def wait_until_asked(self, path: str, times: int = 1, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while sum(path in asked for asked in self.asked) < times:
            assert time.monotonic() < until, f"{path} was not asked {times} times: {self.asked[-10:]}"
            time.sleep(0.01)


class _Handler(BaseHTTPRequestHandler):
    server_state: MetadataServer

    def do_PUT(self) -> None:
        state = self.server_state
        state.asked.append(f"PUT {self.path}")
        state.wait()
        if state.is_failing:
            return self._answer(503)
        if state.cloud != "aws" or self.path != "/latest/api/token":
            return self._answer(404)
        if not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            return self._answer(400)
        token = secrets.token_hex(8)
        state.tokens.add(token)
        return self._answer(200, token)

    def do_GET(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        state.asked.append(f"GET {self.path}")
        state.wait()
        if state.is_failing:
            return self._answer(503)
        if state.cloud == "aws" and self.headers.get("X-aws-ec2-metadata-token") not in state.tokens:
            return self._answer(401)
        if state.cloud == "gcp" and self.headers.get("Metadata-Flavor") != "Google":
            return self._answer(403)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with state.changed:
            if query.get("wait_for_change") == "true":
                before = query["last_etag"]
                state.changed.wait_for(lambda: _etag(state.values[url.path]) != before, float(query["timeout_sec"]))
            value = state.values.get(url.path)
        return self._answer(404) if value is None else self._answer(200, value)

    def _answer(self, code: int, text: str = "") -> None:
        body = text.encode()
        self.send_response(code)
        if self.server_state.cloud == "gcp" and code == 200:
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("ETag", _etag(text))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # who asked may not have waited for a late answer
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(value: str) -> str:
    return value.encode().hex()
