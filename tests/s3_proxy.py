"""How does an S3 server misbehave? A real HTTP proxy in front of one, that answers chosen requests as a test wants it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dpa_ray.store import s3_client

CODES = {
    403: "AccessDenied", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 429: "TooManyRequests",
    500: "InternalError", 503: "SlowDown", 507: "XMinioStorageFull",
}  # fmt: skip

RETRY_S = 60.0
"""Longer than any outage in these tests."""


def forget_clients() -> None:
    """What is set of the clients, or where the server is, counts for the next ones."""
    s3_client._client.cache_clear()
    s3_client._arrow_filesystem.cache_clear()


@dataclass(frozen=True)
class Fault:
    """What becomes of a request: an error (`done`: after the server did what was asked), a delay before it is passed on, an
    answer that ends half-way, or one of another kind altogether."""

    status: int | None = None
    done: bool = False
    delay_s: float = 0.0
    cut: bool = False
    page: bytes | None = None


@dataclass
class Proxy:
    """`rule` is asked about every request, with its method and path (and query); None: it is passed on."""

    port: int = 0
    rule: Callable[[str, str], Fault | None] = lambda method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Every request, in order."""
    num_failed: int = 0
    """How many had a fault, since the last call of `fail`."""

    def fail(self, fault: Fault, *methods: str, containing: str = "", times: int | None = None) -> None:
        """`fault` for the next `times` requests (all of them: None) of `methods` (any: none) whose path has `containing`."""
        lock, left = threading.Lock(), [times]

        def rule(method: str, path: str) -> Fault | None:
            if (methods and method not in methods) or containing not in path:
                return None
            with lock:
                if left[0] is not None:
                    if left[0] == 0:
                        return None
                    left[0] -= 1
            return fault

        self.rule, self.num_failed = rule, 0

    def heal(self) -> None:
        self.rule = lambda method, path: None


@contextmanager
def running_proxy(upstream_port: int) -> Iterator[Proxy]:
    """A proxy on a port of its own. Requests keep their Host header, which their signature covers."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.seen.append((self.command, self.path))
            fault = proxy.rule(self.command, self.path)
            if fault is not None:
                proxy.num_failed += 1
                time.sleep(fault.delay_s)
            if fault is not None and fault.page is not None:
                self._answer(200, [("Content-Type", "text/html")], fault.page)
                return
            if fault is not None and fault.status is not None and not fault.done:
                self._fail(fault.status)
                return
            upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                content = answer.read()
                if fault is not None and fault.status is not None:
                    self._fail(fault.status)
                    return
                headers = [
                    (k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")
                ]
                self._answer(answer.status, headers, content, cut=fault is not None and fault.cut)
            except OSError:
                self.close_connection = True
            finally:
                upstream.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _fail(self, status: int) -> None:
            text = f"<Error><Code>{CODES[status]}</Code><Message>a fault of the test</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], text)

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() != "content-length":
                    self.send_header(name, value)
            length = next((v for k, v in headers if k.lower() == "content-length"), str(len(body)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
