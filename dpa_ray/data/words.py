"""Which tokens make up which word of a text?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

REPLACEMENT = "\ufffd"

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+(?:['’\-](?:(?![{_UNSPACED}])\w)+)*|[^\w\s]+")
"""Letters and digits with inner apostrophes and hyphens; each character of a script that writes no spaces (Thai, Lao,
Burmese, Khmer, Chinese, Japanese); or signs in a row."""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are the whole text.

    A token that ends inside a character adds nothing; the one that completes it adds the character. Each is decoded behind
    the tokens before it, as far back as the last that was whole: some tokenizers strip the blank before a text's first word.
    """
    texts: list[str] = []
    start = told = 0  # ids[start:told] is whole, and told
    for end in range(1, len(ids) + 1):
        before, whole = (_decoded(tokenizer, ids[start:stop]) for stop in (told, end))
        if whole.endswith(REPLACEMENT) and end < len(ids):
            texts.append("")
        else:
            texts.append(whole[len(before) :])
            start, told = told, end
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
    return text


def join(texts: Sequence[str]) -> list[tuple[str, slice]]:
    """The words of a text, each in lower case and with its tokens, which follow each other; blanks belong to none.

    Args:
        texts: what each token adds to the text (`pieces`).

    No token is in two words: what shares a token is one word (a token `."`, or `<|im_end|>`, whatever signs it holds).
    Tokens that add nothing are of the word that the character they begin belongs to.
    """
    text = "".join(texts)
    ends: list[int] = []
    for piece in texts:
        ends.append((ends[-1] if ends else 0) + len(piece))
    starts = [0, *ends[:-1]]
    found: list[tuple[int, int, int, int]] = []  # first and last character, first and last token
    token = 0
    for match in _WORD.finditer(text):
        while ends[token] <= match.start():
            token += 1
        first = token
        while first and starts[first - 1] == ends[first - 1] == starts[first] == match.start():
            first -= 1  # parts of the character that the word begins with
        last = token
        while ends[last] < match.end():
            last += 1
        if found and found[-1][3] >= first:
            found[-1] = (found[-1][0], match.end(), found[-1][2], last)
        else:
            found.append((match.start(), match.end(), first, last))
        token = last
    return [(text[start:end].lower(), slice(first, last + 1)) for start, end, first, last in found]


def runs(columns: Sequence[int], turns: Sequence[int]) -> list[slice]:
    """Targets that follow each other in one turn, as slices of both arguments: no word reaches from one into another.

    Args:
        columns: positions of a sample's targets, rising; turns: which turn each is of.
    """
    pairs = list(zip(columns, turns, strict=True))
    cuts = [i for i, ((a, s), (b, t)) in enumerate(pairwise(pairs), 1) if b != a + 1 or s != t]
    return [slice(a, b) for a, b in pairwise([0, *cuts, len(pairs)])] if pairs else []
