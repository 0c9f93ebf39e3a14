"""How does a sample become token ids and targets? By the stage's template, with targets found by exact spans.

    text   stage 1   [BOS] caption \\n                       targets: caption and \\n
    plain  stage 2   [BOS] <image>... caption \\n            the same; the human turn's words are dropped
    chat   stage 3   the tokenizer's own chat template      targets: the assistant's words and their end-of-turn token

BOS stands there only if the tokenizer itself adds one (in `chat`: if its chat template writes one), an EOS only where a
chat template writes one. A text is tokenised once, as a whole; each `<image>` is then repeated once per image feature.
A token that holds any character of a target's text is a target. Words of a sample that spell a control token of the
tokenizer are encoded as ordinary text: a caption cannot end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dpa_ray.batch import IMAGE_TOKEN, NO_TURN, Encoded
from dpa_ray.data.chat import Finder, Message, Span, own_template, pin_template
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.tokens import Tokens, bare, bos_ids, tokenize
from dpa_ray.errors import UserError

Template = Literal["text", "plain", "chat"]

SEPARATOR = "\n"
"""What follows a caption, and an image that was moved to the start of its turn."""

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ALL_ROLES = frozenset(_ROLES.values())


@dataclass
class Encoder:
    """Samples to `Encoded`, for one stage.

    `tokenizer` is a fast transformers tokenizer that has `<image>` as one token, `image_token_id`; `max_length` counts
    image tokens; `template_date` is what a chat template that reads the clock is told. Raises: UserError where the
    tokenizer cannot serve.
    """

    tokenizer: Any
    template: Template
    max_length: int
    num_image_tokens: int
    image_token_id: int
    template_date: str | None = None
    _chat_template: str = field(default="", init=False, repr=False)
    _raw: Any = field(default=None, init=False, repr=False)
    _bos: list[int] = field(default_factory=list, init=False, repr=False)
    _added: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _control: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _spelled: re.Pattern[str] | None = field(default=None, init=False, repr=False)
    _find: Finder | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            name = type(self.tokenizer).__name__
            raise UserError(f"expected a fast tokenizer (tokenizer.json), which knows character offsets; found {name}")
        found = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if found != self.image_token_id:
            raise ValueError(f"expected {IMAGE_TOKEN} to be token {self.image_token_id}, found {found}")
        if self.template == "chat":
            self._chat_template = pin_template(own_template(self.tokenizer), self.template_date)
            self._find = Finder(self.tokenizer, self._chat_template)
        else:
            self._bos = bos_ids(self.tokenizer)
        self._raw = bare(self.tokenizer)  # BOS is put by hand
        tokens = self.tokenizer.added_tokens_decoder
        self._added = {i: t.content for i, t in tokens.items() if i != self.image_token_id and t.content.strip()}
        # what the chat template writes is a control token too, flagged special or not
        self._control = {i: c for i, c in self._added.items() if tokens[i].special or c in self._chat_template}
        if self._control:
            self._spelled = re.compile("|".join(re.escape(content) for content in self._control.values()))

    def __getstate__(self) -> dict[str, Any]:
        """Only a chat template needs more of the tokenizer than `_raw`: whoever unpickles it imports transformers."""
        return {**vars(self), "tokenizer": self.tokenizer if self.template == "chat" else None}

    def __call__(self, sample: Sample) -> Encoded:
        """Ids and targets of `sample`. Raises: UserError, naming its place, where the template cannot take it."""
        try:
            return self._chat(sample) if self.template == "chat" else self._caption(sample)
        except UserError as err:
            raise UserError(f"{sample.place}: {err}") from None

    def prompt(self, sample: Sample, turn: int) -> tuple[np.ndarray, list[ImageFile]]:
        """What stands before the answer of assistant turn `turn` (0-based): (T,) int64 ids, and the images in them.

        With `chat`, the conversation so far and the template's generation prompt. Nothing is truncated.
        """
        answers = [i for i, t in enumerate(sample.turns) if t.role == "gpt"]
        if not 0 <= turn < len(answers):
            raise IndexError(f"{sample.place}: expected an assistant turn in 0..{len(answers) - 1}, found {turn}")
        turns = sample.turns[: answers[turn]]
        try:
            if self.template == "chat":
                text, literal, _ = self._render([_moved(t) for t in turns], generation_prompt=True)
            else:
                text, spans = self._caption_text(turns)
                literal = [(s.start, s.end) for s in spans]
            tokens = self._tokenize(text, literal)
        except UserError as err:
            raise UserError(f"{sample.place}: {err}") from None
        ids = np.concatenate([np.array(self._bos, np.int64), tokens.ids])
        is_image = ids == self.image_token_id
        return np.repeat(ids, np.where(is_image, self.num_image_tokens, 1)), sample.images[: int(is_image.sum())]

    def check(self, *, system: bool = False) -> None:
        """Try the template before a run: conversations of one and two turns, with a system turn if the data has any.

        Raises: UserError where it gives no way to find answers, or puts no end-of-turn token behind them.
        """
        turns = [
            Turn("human", "What is it?"),
            Turn("gpt", "A red square."),
            Turn("human", "Sure?"),
            Turn("gpt", "Yes."),
        ]
        start = [Turn("system", "Answer briefly.")] if system else []
        for part in (turns[:2], turns):
            sample = Sample(None, "a trial conversation", [*start, *part])
            if self.template != "chat":
                self(sample)
                continue
            text, _, spans = self._render([*start, *part])
            if self._end_of_turn(text, self._tokenize(text, []), spans[-1].end) is None:
                raise UserError(
                    "the tokenizer's chat template puts no special token behind the last answer, so that a model "
                    f"trained on it would never stop; expected one (like <|im_end|> or </s>), found {text[-60:]!r}"
                )

    # -- the templates

    def _caption_text(self, turns: list[Turn]) -> tuple[str, list[Span]]:
        """The images in their places and each caption with its separator, and the captions' spans (separator in)."""
        text, spans = "", []
        for index, turn in enumerate(turns):
            if turn.role != "gpt":
                text += IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN) if self.template == "plain" else ""
                continue
            own = turn.text if self.template == "plain" else turn.text.replace(IMAGE_TOKEN, "")
            spans.append(Span(index, len(text), len(text) + len(own) + len(SEPARATOR), len(text), 0))
            text += own + SEPARATOR
        return text, spans

    def _caption(self, sample: Sample) -> Encoded:
        text, spans = self._caption_text(sample.turns)
        tokens = self._tokenize(text, [(s.start, s.end) for s in spans])
        moved: dict[int, Callable[[int], int]] = {}
        if self.template == "text":
            moved = {i: _without_images(t.text) for i, t in enumerate(sample.turns) if IMAGE_TOKEN in t.text}
        return self._encoded(sample, text, tokens, spans, moved, end_of_turn=False)

    def _chat(self, sample: Sample) -> Encoded:
        turns = [_moved(turn) for turn in sample.turns]
        text, literal, spans = self._render(turns)
        moved = {i: _shift(t.text) for i, t in enumerate(sample.turns) if t.text.count(IMAGE_TOKEN) == 1}
        return self._encoded(sample, text, self._tokenize(text, literal), spans, moved, end_of_turn=True)

    def _render(
        self, turns: list[Turn], *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]], list[Span]]:
        """The rendered conversation, the characters in it that are the sample's where that matters, the answers."""
        messages: list[Message] = [{"role": _ROLES[t.role], "content": t.text} for t in turns]
        forging = self._spelled is not None and any(self._spelled.search(m["content"]) for m in messages)
        assert self._find is not None
        text, spans = self._find(
            messages, _ALL_ROLES if forging else {"assistant"}, generation_prompt=generation_prompt
        )
        literal = [(s.content, s.end) for s in spans] if forging else []
        expected, found = sum(t.text.count(IMAGE_TOKEN) for t in turns), text.count(IMAGE_TOKEN)
        if expected != found:
            raise UserError(f"the chat template does not keep images: expected {expected} {IMAGE_TOKEN}, found {found}")
        return text, literal, [s for s in spans if turns[s.message].role == "gpt"]

    # -- from text to ids and masks

    def _tokenize(self, text: str, literal: list[tuple[int, int]]) -> Tokens:
        """`text` as tokens; no control token comes out of the characters of `literal`."""
        return tokenize(self._raw, text, literal=literal, control=self._control)

    def _end_of_turn(self, text: str, tokens: Tokens, end: int) -> int | None:
        """Index of the end-of-turn token of an answer that ends at `end`: the first one after it (blanks that the
        template writes between them aside), if it is a special or added token."""
        index = tokens.first_from(end)
        while index < len(tokens.ids) and text[tokens.starts[index] : tokens.ends[index]].strip(" ") == "":
            index += 1
        return index if index < len(tokens.ids) and int(tokens.ids[index]) in self._added else None

    def _encoded(
        self,
        sample: Sample,
        text: str,
        tokens: Tokens,
        spans: list[Span],
        moved: dict[int, Callable[[int], int]],
        *,
        end_of_turn: bool,
    ) -> Encoded:
        """Masks from spans; `moved` maps characters of a turn whose text was changed before it was rendered."""
        turn = np.full(len(tokens.ids), NO_TURN, np.int32)
        for number, span in enumerate(spans):
            turn[tokens.run(span.start, span.end)] = number
            last = self._end_of_turn(text, tokens, span.end) if end_of_turn else None
            if last is not None:
                turn[tokens.first_from(span.end) : last + 1] = number
        grounded = np.zeros(len(tokens.ids), bool)
        by_turn = {span.message: span for span in spans}
        for index, start, end in sample.grounded:
            place = by_turn.get(index)
            if place is None:
                continue
            place_of = moved.get(index, int)
            first, stop = (place_of(c) - place.offset + place.content for c in (start, end))
            grounded[tokens.run(max(first, place.content), min(stop, place.end))] = True
        bos = np.array(self._bos, np.int64)
        ids = np.concatenate([bos, tokens.ids])
        turn = np.concatenate([np.full(len(bos), NO_TURN, np.int32), turn])
        grounded = np.concatenate([np.zeros(len(bos), bool), grounded])
        turn[ids == self.image_token_id] = NO_TURN
        if len(turn):
            turn[0] = NO_TURN  # nothing comes before it
        return self._expanded(ids, turn, grounded)

    def _expanded(self, ids: np.ndarray, turn: np.ndarray, grounded: np.ndarray) -> Encoded:
        """Each image token repeated, and all cut at `max_length`: before an image span, never inside one."""
        is_image = ids == self.image_token_id
        repeats = np.where(is_image, self.num_image_tokens, 1)
        ends = np.cumsum(repeats)
        length = int(ends[-1]) if len(ends) else 0
        cut = min(length, self.max_length)
        image_starts, image_ends = (ends - repeats)[is_image], ends[is_image]
        inside = (image_starts < cut) & (cut < image_ends)
        if inside.any():
            cut = int(image_starts[inside][0])
        ids, turn, grounded = (np.repeat(x, repeats)[:cut] for x in (ids, turn, grounded))
        target = turn != NO_TURN
        return Encoded(ids, target, turn, grounded, int((image_ends <= cut).sum()), truncated=cut < length)


def _moved(turn: Turn) -> Turn:
    """A turn's single `<image>` at its start, on a line of its own; several stay where they are."""
    if turn.text.count(IMAGE_TOKEN) != 1:
        return turn
    rest = turn.text.replace(IMAGE_TOKEN, "").strip()
    return Turn(turn.role, f"{IMAGE_TOKEN}{SEPARATOR}{rest}".strip())


def _without_images(text: str) -> Callable[[int], int]:
    """Where a character of `text` stands once every `<image>` is taken out."""
    return lambda at: at - len(IMAGE_TOKEN) * text[:at].count(IMAGE_TOKEN)


def _shift(text: str) -> Callable[[int], int]:
    """Where a character of `text` stands after `_moved`."""
    rest = text.replace(IMAGE_TOKEN, "")
    lead = len(IMAGE_TOKEN + SEPARATOR) - (len(rest) - len(rest.lstrip()))
    before = _without_images(text)
    return lambda at: before(at) + lead
