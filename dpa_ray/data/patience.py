"""How long is an S3 server waited for? An outage shorter than `data.retry_s` only delays a read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from dpa_ray.errors import UserError

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
"""Pauses double between these: Arrow itself has tried for seconds before each."""

_LASTING = (
    "NoSuchBucket", "NoSuchKey", "NO_SUCH", "AccessDenied", "ACCESS_DENIED", "Forbidden", "HTTP response code 403",
    "HTTP response code 404", "HTTP response code 401", "HTTP response code 400", "InvalidAccessKeyId", "INVALID_ACCESS_KEY_ID",
    "SignatureDoesNotMatch", "SIGNATURE_DOES_NOT_MATCH", "ExpiredToken", "EXPIRED_TOKEN", "InvalidToken",
    "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "INVALID_CLIENT_TOKEN_ID", "RESOURCE_NOT_FOUND",
    "Path does not exist",
)  # fmt: skip
"""What Arrow's messages have where waiting does not help: a missing object, wrong credentials (it gives no codes)."""


def is_outage(err: BaseException) -> bool:
    """Might the same call succeed later?"""
    if not isinstance(err, OSError) or err.errno is not None:  # an errno is the local system's
        return False
    return not any(text in str(err) for text in _LASTING)


def patiently(call: Callable[[], T], url: str, retry_s: float) -> T:
    """`call()`, tried again for `retry_s` seconds where `url` is on an S3 server that does not answer.

    Raises: UserError after that; what `call` raises where it is no outage.
    """
    if not url.startswith("s3://") or retry_s == 0:
        return call()
    started, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except OSError as err:
            if not is_outage(err):
                raise
            waited = time.monotonic() - started
            if waited >= retry_s:
                reason = f"{err}".strip().split("\n")[0]
                raise UserError(
                    f"{url}: no answer from the S3 server for {waited:.0f} s ({reason}); expected outages of at most "
                    f"data.retry_s={retry_s:g} seconds: see that it runs, or raise data.retry_s, and start again"
                ) from None
            time.sleep(min(pause, max(0.0, retry_s - waited)))
            pause = min(2 * pause, LONGEST_PAUSE_S)
