"""How Google Cloud Storage is reached: its JSON API with this machine's own account, and Arrow's file system; their limits.

STORAGE_EMULATOR_HOST, as Google's own clients read it, names another server, which is asked without an account.
"""

from __future__ import annotations

import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dpa_ray.store.s3_client import LIMITS, MAX_POOL_CONNECTIONS, Patience

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
API = "https://storage.googleapis.com"
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which Google asks to try again."""
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 2.0
ARROW_RETRY_S = 15


class Refused(Exception):
    """The server's answer is an error."""

    def __init__(self, status: int, text: str, *, repeated: bool = False):
        super().__init__(f"HTTP status {status}: {text}")
        self.status = status
        self.repeated = repeated  # an earlier try may have been carried out

    @property
    def no_bucket(self) -> bool:
        """Is it the bucket that is not there? The status is the same for an object."""
        return self.status == 404 and "The specified bucket does not exist" in str(self)


class NoReply(Exception):
    """The server does not answer, or not to the end."""


class NoAccount(Exception):
    """This machine has no account for Google's cloud, or none that serves."""


@dataclass(frozen=True)
class Answer:
    body: bytes
    headers: dict[str, str]
    status: int

    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}


def endpoint() -> str:
    """Scheme and host of the server."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not host:
        return API
    return host if "://" in host else f"http://{host}"


def endpoint_name() -> str:
    """The server, for messages."""
    return "Google Cloud Storage" if endpoint() == API else f"{endpoint()} (STORAGE_EMULATOR_HOST)"


def call(
    method: str,
    url: str,
    *,
    patience: Patience,
    params: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    also: frozenset[int] = frozenset(),
) -> Answer:
    """One request, made again where the server does not answer or is too busy. `url`: a path of the API, or whole.

    Args:
        also: statuses that are no error, besides 2xx.
    Raises: Refused; NoReply; NoAccount.
    """
    import requests
    from google.auth import exceptions as google

    connect_s, read_s, attempts = LIMITS[patience]
    whole = url if "://" in url else f"{endpoint()}{url}"
    failure: Exception = NoReply("no attempt was made")
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1)) * (1 + random.random()) / 2)  # noqa: S311
        try:
            answer = _session()(
                method,
                whole,
                params=params,
                headers=headers,
                data=body,
                timeout=(connect_s, read_s),
                allow_redirects=False,
            )
        except google.TransportError as err:
            failure = NoReply(type(err).__name__)
        except google.GoogleAuthError as err:
            raise NoAccount(str(err).split("\n")[0]) from None
        except requests.RequestException as err:
            failure = NoReply(type(err).__name__)
        else:
            if answer.status_code < 300 or answer.status_code in also:
                return Answer(answer.content, dict(answer.headers), answer.status_code)
            failure = Refused(answer.status_code, _reason(answer), repeated=attempt > 0)
            if answer.status_code not in AGAIN:
                break
    raise failure


def _reason(answer: Any) -> str:
    """What the server says of an error, in a line."""
    try:
        text = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.text or answer.reason
    return text.strip().split("\n")[0][:300]


def _session() -> Callable[..., Any]:
    """`requests.request` of this thread and environment."""
    bound: Callable[..., Any] = _bound(os.getpid(), threading.get_ident(), endpoint()).request
    return bound


@functools.lru_cache(maxsize=MAX_POOL_CONNECTIONS)
def _bound(pid: int, _thread: int, server: str) -> Any:
    import requests
    from google.auth.transport.requests import AuthorizedSession

    if server == API:
        return AuthorizedSession(_account(pid))
    session = requests.Session()
    session.trust_env = False  # no proxy between this machine and an emulator
    return session


@functools.lru_cache(maxsize=1)
def _account(_pid: int) -> Any:
    import google.auth

    return google.auth.default(scopes=[SCOPE])[0]


def arrow_filesystem() -> Any:
    """Arrow's file system of the same server."""
    return _arrow_filesystem(os.getpid(), endpoint())


@functools.lru_cache(maxsize=2)
def _arrow_filesystem(_pid: int, server: str) -> Any:
    from pyarrow import fs

    limit = timedelta(seconds=ARROW_RETRY_S)
    if server == API:
        return fs.GcsFileSystem(retry_time_limit=limit)
    scheme, _, host = server.partition("://")
    return fs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=host, retry_time_limit=limit)
