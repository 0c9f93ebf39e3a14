"""What is one sample? Turns of text, the encoded images they speak of, and where it all came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["human", "gpt", "system"]


@dataclass
class Turn:
    """One turn of a conversation. `text` holds one `<image>` for each image that belongs here."""

    role: Role
    text: str


@dataclass
class ImageFile:
    """An image as it came: encoded bytes, never re-encoded."""

    name: str
    data: bytes


@dataclass
class Sample:
    """One sample, checked: as many `<image>` in the turns as `images`, in the same order.

    `place` says where in the source it stands (`train.json#12`), for messages; `id` may repeat or be absent.
    `grounded` holds (turn index, start, end): half-open spans of characters of `turns[i].text` (as it stands here,
    with its `<image>`) that the image shows; empty where unknown.
    """

    id: str | None
    place: str
    turns: list[Turn]
    images: list[ImageFile] = field(default_factory=list)
    grounded: list[tuple[int, int, int]] = field(default_factory=list)
