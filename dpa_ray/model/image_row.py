"""The `<image>` row of the vocabulary: a reserved one where there is one, else one row appended."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AddedToken, AutoTokenizer

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.errors import UserError

if TYPE_CHECKING:
    from dpa_ray.model.vlm import ModelRef

RESERVED = re.compile(
    r"<\|?(reserved_special_token_\d+|reserved_\d+|unused_?\d+|unused_token_\d+)\|?>|\[unused\d+\]|\[control_\d+\]"
)
"""Names that model families give to rows which no text uses (Llama-3, Gemma, Phi, BERT style, Mistral)."""


@dataclass(frozen=True)
class ImageRow:
    """Which row of the vocabulary stands for an image feature."""

    token_id: int
    num_base_rows: int  # rows of the base LLM's embedding
    reserved: str | None = None  # name of the reserved token or row that was taken, if any

    @property
    def appended(self) -> bool:
        return self.token_id >= self.num_base_rows

    @property
    def appended_ids(self) -> range:
        """Rows that the model has beyond the base LLM's: `<image>`, after special tokens that had no row before it."""
        return range(self.num_base_rows, self.token_id + 1)

    @property
    def num_softmax_rows(self) -> int | None:
        """Rows of the head that take part in the softmax, or None for all: an appended row must move no other's."""
        return self.num_base_rows if self.appended else None


def load_tokenizer(ref: ModelRef) -> Any:
    """Raises: UserError where the folder or hub id has no fast tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**ref.kwargs())
    except Exception as err:  # a missing file, a broken JSON or an unknown class each raise another type
        first = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise UserError(
            f"model.llm {ref.location}: expected a tokenizer beside the weights, found none: {first}"
        ) from None
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) == 0:
        raise UserError(f"model.llm {ref.location}: expected a fast tokenizer (tokenizer.json), found none")
    return tokenizer


def add_image_token(tokenizer: Any, num_rows: int) -> tuple[Any, ImageRow]:
    """The tokenizer with `<image>` as one special token, and the row that it has.

    Args:
        num_rows: rows of the LLM's embedding.
    Raises: UserError where texts can have tokens that the LLM has no rows for. (Special tokens without a row, a
        padding token above all, are ordinary.)
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    beyond = sorted((i, t) for t, i in vocab.items() if i >= num_rows and t not in special)
    if beyond:
        raise UserError(
            f"model.llm: expected a tokenizer with ids below {num_rows} (the rows of the LLM's embedding), "
            f"found {len(beyond)} tokens beyond, the first {beyond[0][1]!r} with id {beyond[0][0]}"
        )
    if IMAGE_TOKEN in vocab:
        _add_special(tokenizer)
        return _finished(tokenizer, ImageRow(vocab[IMAGE_TOKEN], num_rows, IMAGE_TOKEN))
    reserved = [token for token in vocab if RESERVED.fullmatch(token) and not _is_used(tokenizer, token)]
    if reserved:
        token = min(reserved, key=lambda t: vocab[t])
        return _finished(_renamed(tokenizer, token), ImageRow(vocab[token], num_rows, token))
    # A row beyond the tokenizer's last id is reserved too (Qwen pads its embedding); else this is the appended one.
    _add_special(tokenizer)
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return _finished(tokenizer, ImageRow(token_id, num_rows, f"row {token_id}" if token_id < num_rows else None))


def _is_used(tokenizer: Any, token: str) -> bool:
    """Has somebody given the reserved token a meaning: padding, the end of a text, a sign of the chat template?"""
    roles = [value for value in tokenizer.special_tokens_map.values() if isinstance(value, str)]
    templates = tokenizer.chat_template or ""
    return token in roles or token in (templates if isinstance(templates, str) else "".join(templates.values()))


def _add_special(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)


def _finished(tokenizer: Any, row: ImageRow) -> tuple[Any, ImageRow]:
    ids = tokenizer(f"a{IMAGE_TOKEN}b", add_special_tokens=False)["input_ids"]
    if ids.count(row.token_id) != 1:
        raise UserError(f"model.llm: its tokenizer does not keep {IMAGE_TOKEN} as one token: found ids {ids}")
    num_rows = max(row.num_base_rows, row.token_id + 1)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= num_rows:
        # batches are padded; what is padded is masked, so any token that has a row will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, row


def _renamed(tokenizer: Any, token: str) -> Any:
    """The same tokenizer with the reserved `token` called `<image>`."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.json"):
            value = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(_replaced(value, token), ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _replaced(value: Any, token: str) -> Any:
    """`value` with every string, as key or value, that is exactly `token` replaced."""
    if isinstance(value, dict):
        changed = {IMAGE_TOKEN if k == token else k: _replaced(v, token) for k, v in value.items()}
        if changed.get("content") == IMAGE_TOKEN:
            changed["special"] = True
            changed["normalized"] = False
        return changed
    if isinstance(value, list):
        return [_replaced(item, token) for item in value]
    return IMAGE_TOKEN if value == token else value
