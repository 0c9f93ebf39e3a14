"""How do a caption, or turns in their usual spellings, become a LLaVA record? Which `llava.parse` then judges."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data.llava import Unusable

CONVERSATIONS = ("conversations", "messages")
CAPTIONS = ("caption", "text", "txt")
IDS = ("id", "key", "__key__")
"""Usual names of columns and keys."""


def find_name(names: Collection[str], usual: Sequence[str]) -> str | None:
    """The one of `usual` among `names`, None where there is none. Raises: Unusable where there are several."""
    found = [name for name in usual if name in names]
    if len(found) > 1:
        raise Unusable(
            "bad_record", f"expected one of {', '.join(usual)}, found {' and '.join(found)}: name one by columns"
        )
    return found[0] if found else None


def conversation_record(identity: Any, turns: Any, image_names: Sequence[str]) -> dict[str, Any]:
    """A record of turns: a list of {from, value} or {role, content}, or that list as JSON text.

    A content that is a list of parts ({type: text, text: ...}, {type: image}) becomes one text. Raises: Unusable.
    """
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as err:
            raise Unusable(
                "bad_record", f"expected turns as a list or as JSON, found a text that is none: {err}"
            ) from None
    if isinstance(turns, list):
        turns = [_flat(turn) for turn in turns]
    return {"id": identity, "image": list(image_names), "conversations": turns}


def caption_record(identity: Any, caption: Any, image_names: Sequence[str], prompt: Any = None) -> dict[str, Any]:
    """A record of one caption, or one answer to `prompt`, behind all of its images."""
    asked = [] if prompt is None else [str(prompt)]
    places = [] if asked and IMAGE_TOKEN in asked[0] else [IMAGE_TOKEN] * len(image_names)
    human = "\n".join([*places, *asked])
    caption = "" if caption is None else caption  # no words: the reason is the same
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": caption}]
    return {"id": identity, "image": list(image_names), "conversations": turns}


def _flat(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}  # Parquet fills absent keys with null
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(IMAGE_TOKEN)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise Unusable("bad_record", f"expected parts of type text or image in a turn, found {str(part)[:80]}")
    return {**turn, "content": "\n".join(texts)}
