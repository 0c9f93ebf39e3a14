"""Which tokens does a text become, and which characters does each of them cover?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpa_ray.errors import UserError


@dataclass
class Tokens:
    """Token ids of a text, and the characters [start, end) that each covers; starts never fall."""

    ids: np.ndarray  # (T,) int64
    starts: np.ndarray  # (T,) int64
    ends: np.ndarray  # (T,) int64

    def overlapping(self, start: int, end: int) -> np.ndarray:
        """(T,) bool: the tokens that hold any character of [start, end)."""
        return (self.starts < end) & (self.ends > start)

    def first_from(self, position: int) -> int:
        """Index of the first token that starts at `position` or later."""
        return int(np.searchsorted(self.starts, position, side="left"))


def tokenize(
    tokenizer: Any, text: str, *, literal: Sequence[tuple[int, int]] = (), control_ids: Collection[int] = ()
) -> Tokens:
    """`text` as one string, without special tokens added.

    No token of `control_ids` comes out of the characters of `literal` (users' words): where such a text spells a control
    token (`<|im_end|>` in a caption about chat formats), it is cut after its first character and becomes ordinary
    tokens. Nothing is cut elsewhere, so that any other text is tokenised whole. Raises: UserError where a cut is in vain.
    """
    cuts: set[int] = set()
    while True:
        tokens = _tokenize_pieces(tokenizer, text, sorted(cuts))
        found = _forged(tokenizer, text, tokens, literal, control_ids) if literal else set()
        if not found:
            return tokens
        if found <= cuts:
            place = text[min(found) - 1 :][:20]
            raise UserError(f"expected words to become ordinary tokens, found a control token at {place!r}")
        cuts |= found


def bos_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing."""
    plain, whole = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def _tokenize_pieces(tokenizer: Any, text: str, cuts: list[int]) -> Tokens:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for lead in ("\n", "") if start else ("",):
            # behind a newline, so that no tokenizer takes the piece for the beginning of a text (and puts a space there)
            encoding = tokenizer(
                lead + text[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            own = [(i, s, e) for i, (s, e) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)]
            own = [(i, s, e) for i, s, e in own if not (lead and e <= 1)]
            if not (lead and own and own[0][1] < 1):  # else the newline has merged with the piece
                break
        ids += [i for i, _, _ in own]
        spans += [(start + s - len(lead), start + e - len(lead)) for _, s, e in own]
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T.copy()
    # Some tokenizers leave blanks out of offsets: what lies between two tokens belongs to the later one.
    ends = np.maximum.accumulate(ends) if len(ends) else ends
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]])) if len(starts) else starts
    return Tokens(np.array(ids, np.int64), np.maximum.accumulate(starts) if len(starts) else starts, ends)


def _forged(
    tokenizer: Any, text: str, tokens: Tokens, literal: Sequence[tuple[int, int]], control_ids: Collection[int]
) -> set[int]:
    """Where to cut `text` so that the control tokens that users' words spell come apart."""
    cuts = set()
    for index in np.flatnonzero(np.isin(tokens.ids, list(control_ids))):
        content = tokenizer.added_tokens_decoder[int(tokens.ids[index])].content
        at = text.find(content, int(tokens.starts[index]))
        if at < 0 or at >= tokens.ends[index]:
            continue
        if any(start < at + len(content) and at < end for start, end in literal):
            cuts.add(at + 1)
    return cuts
