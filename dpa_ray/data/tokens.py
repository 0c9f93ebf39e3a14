"""Which tokens does a text become, and which characters does each of them cover?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dpa_ray.errors import UserError


@dataclass
class Tokens:
    """Token ids of a text, and the characters [start, end) that each covers; starts never fall."""

    ids: np.ndarray  # (T,) int64
    starts: np.ndarray  # (T,) int64
    ends: np.ndarray  # (T,) int64

    def run(self, start: int, end: int) -> slice:
        """The tokens that hold any character of [start, end); they follow each other."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        return slice(first, max(first, int(np.searchsorted(self.starts, end, side="left"))))

    def first_from(self, position: int) -> int:
        """Index of the first token that starts at `position` or later."""
        return int(np.searchsorted(self.starts, position, side="left"))


def bare(tokenizer: Any) -> Any:
    """A copy of what does the work in a fast transformers tokenizer (a `tokenizers.Tokenizer`), set to give what
    `tokenizer(text, add_special_tokens=False)` gives, without post-processor: some of those leave blanks out of offsets.

    Calling it saves what transformers does around it, which for a short text is more than the work itself.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def tokenize(
    backend: Any, text: str, *, literal: Sequence[tuple[int, int]] = (), control: Mapping[int, str] | None = None
) -> Tokens:
    """`text` as one string through a `bare` tokenizer.

    No token of `control` (its id, and how it is written) comes out of the characters of `literal` (users' words): where
    such a text spells a control token (`<|im_end|>` in a caption about chat formats), it is cut after its first character
    and becomes ordinary tokens. Nothing is cut elsewhere, so that any other text is tokenised whole. Raises: UserError
    where a cut is in vain.
    """
    cuts: set[int] = set()
    while True:
        tokens = _tokenize_pieces(backend, text, sorted(cuts))
        found = _forged(text, tokens, literal, control) if literal and control else set()
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


def _tokenize_pieces(backend: Any, text: str, cuts: list[int]) -> Tokens:
    if cuts:
        ids, spans = _cut(backend, text, cuts)
    else:
        encoding = backend.encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
    starts, ends = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(spans)).reshape(-1, 2).T.copy()
    # Some tokenizers leave blanks out of offsets: what lies between two tokens belongs to the later one.
    ends = np.maximum.accumulate(ends) if len(ends) else ends
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]])) if len(starts) else starts
    return Tokens(np.array(ids, np.int64), np.maximum.accumulate(starts) if len(starts) else starts, ends)


def _cut(backend: Any, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of `text`, its pieces between `cuts` tokenised apart."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for lead in ("\n", "") if start else ("",):
            # behind a newline, so that no tokenizer takes the piece for the beginning of a text (and puts a space there)
            encoding = backend.encode(lead + text[start:end], add_special_tokens=False)
            own = [(i, s, e) for i, (s, e) in zip(encoding.ids, encoding.offsets, strict=True)]
            own = [(i, s, e) for i, s, e in own if not (lead and e <= 1)]
            if not (lead and own and own[0][1] < 1):  # else the newline has merged with the piece
                break
        ids += [i for i, _, _ in own]
        spans += [(start + s - len(lead), start + e - len(lead)) for _, s, e in own]
    return ids, spans


def _forged(text: str, tokens: Tokens, literal: Sequence[tuple[int, int]], control: Mapping[int, str]) -> set[int]:
    """Where to cut `text` so that the control tokens that users' words spell come apart."""
    cuts: set[int] = set()
    if control.keys().isdisjoint(tokens.ids.tolist()):
        return cuts
    for index, token in enumerate(tokens.ids.tolist()):
        if token not in control:
            continue
        content = control[token]
        at = text.find(content, int(tokens.starts[index]))
        if at < 0 or at >= tokens.ends[index]:
            continue
        if any(start < at + len(content) and at < end for start, end in literal):
            cuts.add(at + 1)
    return cuts
