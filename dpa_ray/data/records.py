"""Where does each record of a JSON or JSONL file stand? Read as a stream, so that memory is bounded by a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dpa_ray.errors import UserError

MAX_RECORD_BYTES = 64 * 2**20
_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}


@dataclass(frozen=True)
class NotJson:
    """What stands in place of a record that is no JSON; `cut` where it ends too soon."""

    detail: str
    cut: bool = False


@dataclass(frozen=True)
class Record:
    """One record: its value, and the bytes [start, stop) of the file that it was read from."""

    value: Any
    start: int
    stop: int


def from_json(text: str) -> Any:
    """The value of one JSON text, NotJson where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        return NotJson(str(err))


class NotRecords(UserError):
    """A file that holds no records; the message does not name the file."""


@dataclass(frozen=True)
class Records:
    """A file's records, to be gone through once; `lines` where each has a line of its own (JSONL)."""

    lines: bool
    records: Iterator[Record]


def scan(chunks: Iterable[bytes]) -> Records:
    """The records of a whole file: the elements of a JSON list, or one JSON value a line (JSONL).

    Bytes that are not UTF-8 come through as lone surrogates in the record's strings; a BOM is skipped.
    Raises: NotRecords where the file is neither, now or when a record is taken.
    """
    text = _Text(chunks)
    if text.starts_with(b"\xef\xbb\xbf"):
        text.position += 3
    for mark, name in _BOMS.items():
        if text.starts_with(mark):
            raise NotRecords(f"expected JSON or JSONL in UTF-8, found {name}")
    first = text.next_character()
    if first == "":
        raise NotRecords("expected a JSON list of records or one record a line, found an empty file")
    if first == "[":
        text.position += 1
        return Records(False, _elements(text, closed=True))
    if first != "{":
        raise NotRecords(
            f"expected a JSON list of records or one record a line, found a file that begins {text.peek()!r}"
        )
    return Records(True, _lines(text, checked=True))


def scan_part(data: bytes, offset: int, *, lines: bool) -> Iterator[Record]:
    """The records in `data`, the bytes from `offset` on of a file that `scan` went through before."""
    text = _Text([data], offset)
    return _lines(text) if lines else _elements(text, closed=False)


class _Text:
    """A window on the file, one character for each byte (Latin-1), so that positions are the file's own."""

    def __init__(self, chunks: Iterable[bytes], offset: int = 0):
        self._chunks = iter(chunks)
        self._ended = False
        self.window, self.position, self.offset = "", 0, offset

    def more(self, least: int = 1) -> bool:
        """Take in at least `least` bytes more, if there are any."""
        parts, size = [], 0
        while size < least and not self._ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
                break
            parts.append(chunk)
            size += len(chunk)
        if not parts:
            return False
        self.offset += self.position
        self.window = self.window[self.position :] + b"".join(parts).decode("latin-1")
        self.position = 0
        return True

    @property
    def place(self) -> int:
        """Bytes of the file before the position."""
        return self.offset + self.position

    @property
    def left(self) -> int:
        return len(self.window) - self.position

    def starts_with(self, mark: bytes) -> bool:
        while self.left < len(mark) and self.more():
            pass
        return self.window.startswith(mark.decode("latin-1"), self.position)

    def peek(self) -> str:
        return self.window[self.position : self.position + 40]

    def next_character(self) -> str:
        """The next character that is no blank, not taken; "" at the end."""
        while True:
            while self.position < len(self.window):
                if self.window[self.position] not in _BLANK:
                    return self.window[self.position]
                self.position += 1
            if not self.more():
                return ""


def _decoded(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8", "surrogateescape"))


def _elements(text: _Text, *, closed: bool) -> Iterator[Record]:
    """The elements of a list from behind its bracket, to its end or (not `closed`) the text's."""
    first = True
    while True:
        mark = text.next_character()
        if mark == "" and not closed:
            return
        if mark == "]" and closed and first:
            break
        value, stop = _element(text)
        raw = text.window[text.position : stop].encode("latin-1")
        record = Record(value if raw.isascii() else _decoded(raw), text.place, text.place + len(raw))
        text.position = stop
        yield record
        first = False
        mark = text.next_character()
        if mark == ",":
            text.position += 1
        elif mark == "]" and closed:
            break
        elif mark or closed:
            raise NotRecords(f"expected ',' or ']' after a record, found {text.peek()!r} at byte {text.place}")
    text.position += 1
    if text.next_character():
        raise NotRecords(f"expected the end of the file after the list, found {text.peek()!r} at byte {text.place}")


def _element(text: _Text) -> tuple[Any, int]:
    """The value at the position, and where it stops in the window; takes in what it needs."""
    while True:
        try:
            value, stop = _DECODER.raw_decode(text.window, text.position)
        except (ValueError, RecursionError) as err:
            if isinstance(err, json.JSONDecodeError) and text.left < MAX_RECORD_BYTES and text.more(text.left):
                continue
            raise _not_json(text, err) from None
        if stop < len(text.window) or not text.more(text.left):  # a number may go on in what was not read yet
            return value, stop


def _not_json(text: _Text, err: Exception) -> NotRecords:
    if isinstance(err, json.JSONDecodeError):
        place = text.offset + err.pos
        if text.left >= MAX_RECORD_BYTES:
            return NotRecords(
                f"expected records of at most {MAX_RECORD_BYTES} bytes, found a longer one at {text.place}"
            )
        return NotRecords(f"expected JSON, found {text.window[err.pos :][:40]!r} at byte {place} ({err.msg})")
    return NotRecords(f"expected JSON, found a value that cannot be read at byte {text.place} ({err})")


def _lines(text: _Text, *, checked: bool = False) -> Iterator[Record]:
    """One record a line; blank lines are none. A line that is no JSON becomes NotJson.

    Raises: NotRecords, if `checked`, where the first line is but the beginning of one object over many lines.
    """
    while text.next_character():
        end = text.window.find("\n", text.position)
        while end < 0 and text.left < MAX_RECORD_BYTES and text.more(text.left):
            end = text.window.find("\n", text.position)
        if end < 0:
            if text.left >= MAX_RECORD_BYTES:
                raise NotRecords(
                    f"expected lines of at most {MAX_RECORD_BYTES} bytes, found a longer one at {text.place}"
                )
            end = len(text.window)
        raw, start = text.window[text.position : end].encode("latin-1"), text.place
        value: Any
        try:
            value = _decoded(raw)
        except json.JSONDecodeError as err:
            value = NotJson(f"{err.msg} at character {err.pos} of the line", cut=err.pos >= len(err.doc.rstrip()))
        except (ValueError, RecursionError) as err:
            value = NotJson(str(err))
        text.position = end
        if checked and isinstance(value, NotJson) and value.cut and text.next_character() != "{":
            raise NotRecords("expected a JSON list of records or one record a line, found an object over many lines")
        checked = False
        yield Record(value, start, start + len(raw))
