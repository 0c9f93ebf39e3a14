"""Is an error that Arrow raised about an S3 server that is away or too busy, so that the same call may succeed later?"""

from __future__ import annotations

import re

_AWAY = re.compile(
    r"REQUEST_TIMEOUT|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|HTTP status (?:429|5\d\d)\b"
)
# libcurl's numbers: name not resolved, refused, cut short, timed out, empty answer, send or receive failed, HTTP/2 reset
_CURL_AWAY = frozenset({6, 7, 16, 18, 28, 52, 55, 56, 92})
_GOOGLE_AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED")
_TLS_FAILED = 35
_TLS_CUT = re.compile(r"reset by peer|unexpected eof|SYSCALL", re.IGNORECASE)


def told_by_arrow(text: str) -> bool:
    """`text` is that of an OSError of Arrow's, which has its kind there only (seen with pyarrow 26 and libcurl).

    A TLS failure means a wrong scheme or certificate, unless the connection broke off.
    """
    if "google::cloud::Status(" in text:
        return text.partition("google::cloud::Status(")[2].startswith(_GOOGLE_AWAY)
    if "AWS Error " not in text:
        return False
    kind = text.partition("AWS Error ")[2]
    if not kind.startswith("NETWORK_CONNECTION"):
        return _AWAY.match(kind.removeprefix("UNKNOWN (")) is not None
    code = re.search(r"curlCode: (\d+)", kind)
    if code is None:
        return True
    return int(code[1]) in _CURL_AWAY or (int(code[1]) == _TLS_FAILED and _TLS_CUT.search(kind) is not None)
