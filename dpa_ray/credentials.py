"""Does a text hold an address with a user and password in it? Such are refused, and never shown."""

from __future__ import annotations

import re

_IN_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]*@")


def has_credentials(text: str) -> bool:
    """Is there something like https://user:password@host in `text`?"""
    return _IN_ADDRESS.search(text) is not None


def without_credentials(text: str) -> str:
    """`text`, for people: what stands before the @ of an address is left out."""
    return _IN_ADDRESS.sub(r"\1***@", text)
