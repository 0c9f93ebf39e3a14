"""Is a LLaVA record a sample? Its turns and image names, or why it cannot be used.

{"id": ..., "image": "a.jpg" or [...] or absent, "conversations": [{"from": "human", "value": "<image>..."}, ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data.files import unsafe_name
from dpa_ray.data.records import NotJson
from dpa_ray.data.sample import Role, Turn

ROLES: dict[str, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

REASONS = {
    "bad_record": "no JSON object with conversations (and image) as LLaVA has them",
    "not_utf8": "text that is not UTF-8",
    "roles": "turns that are not: system (at most one, first), then human and gpt by turns",
    "no_assistant_text": "no assistant turn with words in it",
    "unsafe_image_name": "an image name that is absolute, a URL, or leads out of the image folder",
    "unsafe_member": "a tar member that is no plain file, or whose name is absolute or leads out of the tar",
    "image_count": f"as many {IMAGE_TOKEN} in the turns as images was expected",
    "image_missing": "no such image file",
    "image_empty": "an image file of 0 bytes",
    "image_truncated": "an image file that ends too soon",
    "image_corrupt": "an image file that does not decode",
    "image_not_an_image": "a file that is no image of a known format",
    "image_bomb": "more pixels than any picture has (decompression bomb)",
    "image_size": "an image file, side or ratio of sides beyond all use",
    "image_animated": "more than one frame",
}
"""Why a sample goes to the quarantine."""


class Unusable(Exception):
    """A sample that goes to the quarantine; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Parsed:
    """A record without its image bytes."""

    turns: list[Turn]
    image_names: list[str]


def record_id(record: Any) -> str | None:
    """The record's id as text (numbers as they stand), None where it has none."""
    value = record.get("id") if isinstance(record, dict) else None
    if value is None or isinstance(value, bool | list | dict):
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()


def image_names(record: Any) -> list[str]:
    """The names under `image` that could be file names, for listing; nothing is checked."""
    value = record.get("image") if isinstance(record, dict) else None
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and name and unsafe_name(name) is None and _is_utf8(name)]


def parse(record: Any) -> Parsed:
    """Raises: Unusable with the reason."""
    if isinstance(record, NotJson):
        raise Unusable("bad_record", f"expected a JSON object, found a line that is no JSON: {record.detail}")
    if not isinstance(record, dict):
        raise Unusable("bad_record", f"expected a JSON object, found {_kind(record)}")
    turns = _turns(record.get("conversations"))
    names = _names(record.get("image"))
    if not all(_is_utf8(text) for text in [*(t.text for t in turns), *names, str(record.get("id"))]):
        raise Unusable("not_utf8", "expected UTF-8 in turns, image names and id, found bytes or escapes that are none")
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if any(role != ("human", "gpt")[i % 2] for i, role in enumerate(talk)):
        raise Unusable("roles", f"expected human and gpt by turns, found {', '.join(roles[:12])}")
    if not any(_has_words(turn.text) for turn in turns if turn.role == "gpt"):
        raise Unusable("no_assistant_text", f"expected a gpt turn with words in it, found {len(turns)} turns without")
    for name in names:
        problem = unsafe_name(name)
        if problem:
            raise Unusable("unsafe_image_name", f"{name[:200]!r}: {problem}")
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if found != len(names):
        raise Unusable("image_count", f"expected {len(names)} {IMAGE_TOKEN} for as many images, found {found}")
    return Parsed(turns, names)


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise Unusable("bad_record", f"expected conversations as a list of turns, found {_kind(value)}")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise Unusable("bad_record", f"turn {number}: expected an object, found {_kind(turn)}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise Unusable(
                "bad_record",
                f"turn {number}: expected texts under from and value, found {_kind(role)} and {_kind(text)}",
            )
        if role not in ROLES:
            raise Unusable("roles", f"turn {number}: expected one of {', '.join(ROLES)}, found {role[:40]!r}")
        turns.append(Turn(ROLES[role], text))
    return turns


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise Unusable("bad_record", f"expected image as a name or a list of names, found {_kind(value)}")
    if "" in names:
        raise Unusable("image_missing", "expected an image name, found an empty one")
    return names


def _has_words(text: str) -> bool:
    """Is there anything to see beside images? Zero-width and control characters are nothing."""
    return any(c.isprintable() and not c.isspace() for c in text.replace(IMAGE_TOKEN, ""))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__) if value not in ([], {}) else "an empty one"
