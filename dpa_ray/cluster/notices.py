"""Does the cloud say that this machine will be taken away, and when? AWS's and Google's metadata servers.

Standard library only: it is asked every few seconds on machines that have other work.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

AWS_URL, GCP_URL = "http://169.254.169.254", "http://metadata.google.internal"

AWS_NOTICE_S = 120.0
"""Between AWS's notice and the machine's end, where the notice does not say."""
GCP_NOTICE_S = 30.0
"""Google names no time: at least this long after a preemption, and 60 s before maintenance that ends a machine."""
GCP_MAINTENANCE_S = 60.0

TOKEN_TTL_S = 21_600
ANSWER_WITHIN_S = 5.0

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Metadata is this machine's own: a proxy would answer with another's, if at all."""


class NoMetadata(Exception):
    """The metadata server does not answer, or not as it should; the next look may succeed."""


@dataclass(frozen=True)
class Notice:
    """This machine will go."""

    text: str  # what was said, for people
    deadline_s: float | None  # by time.time; None: nobody knows when


class Provider(Protocol):
    """A cloud's way of saying it."""

    name: str

    def look(self, wait_s: float) -> Notice | None:
        """What is said now, or within `wait_s` seconds; None where nothing was. Raises: NoMetadata."""


class Aws:
    """EC2's instance metadata, version 2: spot interruptions, and on demand the recommendation that comes before some."""

    name = "aws"

    def __init__(self, url: str | None = None, *, rebalance: bool = False):
        """`rebalance`: take the recommendation to rebalance, which names no time, for a notice."""
        self.url = (url or AWS_URL).rstrip("/")
        self.rebalance = rebalance
        self.token: str | None = None

    def is_here(self) -> bool:
        """Does such a server answer?"""
        try:
            self.token = self._new_token()
        except NoMetadata:
            return False
        return True

    def look(self, wait_s: float) -> Notice | None:
        notice = self._interruption()
        if notice is None and self.rebalance and self._get("/latest/meta-data/events/recommendations/rebalance"):
            notice = Notice("AWS recommends to rebalance: the risk of an interruption is high", None)
        if notice is None:
            time.sleep(wait_s)
        return notice

    def _interruption(self) -> Notice | None:
        said = self._get("/latest/meta-data/spot/instance-action")
        if said is None:
            return None
        deadline_s, action = time.time() + AWS_NOTICE_S, "take it away"
        try:
            values = json.loads(said)
            action = str(values["action"])
            deadline_s = datetime.fromisoformat(values["time"]).timestamp()
        except (ValueError, KeyError, TypeError):  # that something is said is the notice
            pass
        return Notice(f"AWS will {action} this spot instance", deadline_s)

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        return _ask(f"{self.url}/latest/api/token", headers, method="PUT")[0]

    def _get(self, path: str) -> str | None:
        """None where there is no such thing, which is how AWS says that nothing is planned."""
        for is_last in (False, True):
            if self.token is None:
                self.token = self._new_token()
            try:
                return _ask(f"{self.url}{path}", {"X-aws-ec2-metadata-token": self.token})[0]
            except _Refused as err:
                if err.code == 404:
                    return None
                if err.code != 401 or is_last:
                    raise
                self.token = None  # it lapsed
        return None


class Gcp:
    """Compute Engine's metadata: preemption, and maintenance that ends a machine (those with GPUs cannot be moved)."""

    name = "gcp"
    HEADERS = {"Metadata-Flavor": "Google"}

    def __init__(self, url: str | None = None):
        self.url = (url or GCP_URL).rstrip("/")
        self.etag: str | None = None  # of the last answer on preemption: a change between two looks is not missed

    def is_here(self) -> bool:
        """Does such a server answer?"""
        try:
            _, headers = _ask(f"{self.url}/computeMetadata/v1/instance/id", self.HEADERS)
        except NoMetadata:
            return False
        return headers.get("Metadata-Flavor") == "Google"

    def look(self, wait_s: float) -> Notice | None:
        event, _ = _ask(f"{self.url}/computeMetadata/v1/instance/maintenance-event", self.HEADERS)
        if event.strip() == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice("Google will end this machine for maintenance of its host", time.time() + GCP_MAINTENANCE_S)
        query = ""
        if self.etag is not None:
            query = f"?wait_for_change=true&timeout_sec={max(1, round(wait_s))}&last_etag={self.etag}"
        path = f"{self.url}/computeMetadata/v1/instance/preempted{query}"
        said, headers = _ask(path, self.HEADERS, timeout_s=wait_s + ANSWER_WITHIN_S)
        if said.strip() == "TRUE":
            return Notice("Google preempts this machine", time.time() + GCP_NOTICE_S)
        self.etag = headers.get("ETag")
        if self.etag is None:  # cannot be waited with
            time.sleep(wait_s)
        return None


def detect(url: str | None = None, *, rebalance: bool = False) -> Provider | None:
    """The cloud that this machine is in; None where no metadata server answers (now)."""
    gcp, aws = Gcp(url), Aws(url, rebalance=rebalance)
    if gcp.is_here():
        return gcp
    return aws if aws.is_here() else None


class _Refused(NoMetadata):
    """The server answered, but with an HTTP error."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


def _ask(
    url: str, headers: dict[str, str], method: str = "GET", timeout_s: float = ANSWER_WITHIN_S
) -> tuple[str, http.client.HTTPMessage]:
    """Body and headers. Raises: NoMetadata."""
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 (http, by an operator's flag)
    try:
        with _direct.open(request, timeout=timeout_s) as answer:
            return answer.read(65_536).decode("utf-8", "replace"), answer.headers
    except urllib.error.HTTPError as err:
        err.close()
        raise _Refused(err.code, f"{url}: HTTP {err.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise NoMetadata(f"{url}: {getattr(err, 'reason', None) or err or type(err).__name__}") from None
