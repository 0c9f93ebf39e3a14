"""Where does each text stand in what a chat template makes of a conversation? By characters, exactly.

The conversation is rendered twice: as it is, and with a sentinel in place of every text asked for. The second rendering
gives the template's fixed pieces; the first must be these pieces with the texts between them (trimmed, where the
template trims). Nothing is guessed and nothing tokenised here: where the two do not fit, the template is refused.

With sentinels in place of all texts, conversations of the same roles look alike: that rendering is kept (`Finder`), and
serves wherever the pieces fit in exactly one way.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

from dpa_ray.data.tokens import bos_ids
from dpa_ray.errors import UserError

Message = dict[str, str]

_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_DATE_FORMATS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d")
_TRIMS = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lstrip(),
    lambda text: text.rstrip(),
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


_MAX_KEPT = 1024  # renderings of a Finder: conversations have as many lengths


@dataclass
class Span:
    """One message's text in a rendering: characters [start, end). From `content` on it is text[offset:] of the message
    (`content` > `start` where a thinking block, which the template rewrites, comes first)."""

    message: int
    start: int
    end: int
    content: int
    offset: int


def begun_with_bos(template: str, tokenizer: Any) -> str:
    """`template`, beginning with the BOS that the tokenizer puts before every text, where the template itself writes none.

    Without it, chats would begin otherwise than in training, one way or the other: `apply_chat_template` of transformers'
    processors adds a BOS that it does not find, vLLM adds none. (Who tokenises what was rendered as a text of its own gets
    one more, as with every template that writes one.)
    """
    if bos_ids(tokenizer) != [tokenizer.bos_token_id]:
        return template
    message = [{"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(message, chat_template=template, tokenize=False)
    except Exception:  # a template that does not take it is told of where conversations are encoded
        return template
    return template if text.startswith(tokenizer.bos_token) else "{{ bos_token }}" + template


def pin_template(template: str, template_date: str | None) -> str:
    """`template` with what varies from day to day or call to call fixed, so that training and use render alike.

    A clock (`strftime_now`) and a `date_string` give `template_date`; `enable_thinking` (Qwen3: does the generation
    prompt hold the empty thinking block that answers have in training?) is false unless the caller says otherwise.
    Written into the template itself, because transformers turns functions among a template's arguments into text. A
    template that asks for none of these comes back as it is. Raises: UserError where the date cannot be read.
    """
    lines = []
    if template_date is not None and ("strftime_now" in template or "date_string" in template):
        day = _parse_date(template_date)
        text = "f"
        for code in "aAbBdmyYjHIMSpUwW":
            value = day.strftime(f"%{code}")
            text += f"|replace('%-{code}', {value.lstrip('0') or '0'!r})|replace('%{code}', {value!r})"
        lines.append("{% macro strftime_now(f) %}{{ " + text + " }}{% endmacro %}")
        lines.append(
            "{% if date_string is not defined %}{% set date_string = " + repr(template_date) + " %}{% endif %}"
        )
    if "enable_thinking" in template:
        lines.append("{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}")
    # the newline after a block tag is dropped (trim_blocks): the template still starts a line of its own
    return "".join(line + "\n" for line in lines) + template


def _parse_date(text: str) -> datetime:
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    raise UserError(f"model.template_date: expected a date like '26 Jul 2024' or '2024-07-26', found {text!r}")


def own_template(tokenizer: Any) -> str:
    """The tokenizer's own chat template. Raises: UserError where it has none."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "expected a tokenizer with a chat template for the stage instruct, found none: take an instruct model as "
            "model.llm, or put a chat_template.jinja into its folder"
        ) from None
    return template


def render(tokenizer: Any, template: str, messages: list[Message], *, generation_prompt: bool = False) -> str:
    """`messages` through `template`. Raises: UserError with the template's own words where it refuses them."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    except jinja2.exceptions.TemplateError as err:
        roles = [message["role"] for message in messages]
        hint = "; fold the system turn's text into the first human turn" if "system" in roles else ""
        raise UserError(f"the chat template refuses a conversation of {', '.join(roles)}: {err}{hint}") from None
    return text


def find_texts(
    tokenizer: Any,
    template: str,
    messages: list[Message],
    roles: Collection[str],
    *,
    generation_prompt: bool = False,
    real: str | None = None,
) -> tuple[str, list[Span]]:
    """The rendering of `messages` (`real`, if it is there already), and in it the span of the text of every message that
    has one of `roles`.

    Raises: UserError where the template does something to these texts from which their spans cannot be found.
    """
    if real is None:
        real = render(tokenizer, template, messages, generation_prompt=generation_prompt)
    wanted = [i for i, message in enumerate(messages) if message["role"] in roles]
    stem = "zqMark"
    while stem in real:
        stem += "q"
    for thinking in (False, True):
        values: dict[str, str] = {}  # sentinel -> the text that it stands for
        marked = [dict(message) for message in messages]
        for i in wanted:
            marked[i]["content"] = _marked(messages[i]["content"], f"{stem}{i}", values, thinking)
        shown = render(tokenizer, template, marked, generation_prompt=generation_prompt)
        pieces = re.split(f"({stem}[0-9]+[ab]z)", shown)
        spans = _align(real, pieces, values, messages, len(stem))
        if spans is not None and [span.message for span in spans] == wanted:
            return real, spans
        if not any(_THINK.match(messages[i]["content"]) for i in wanted):
            break
    raise UserError(
        "the tokenizer's chat template gives no way to find the texts of a conversation in what it renders: expected "
        f"the text of every {' and '.join(sorted(roles))} message once, in order, as it is or trimmed; this template "
        f"leaves out, repeats or rewrites one. Rendered: {real[:500]!r}"
    )


class Finder:
    """`find_texts` for one template, with the same results, in about half the time."""

    def __init__(self, tokenizer: Any, template: str):
        self._tokenizer, self._template = tokenizer, template
        self._fixed: dict[tuple[tuple[str, ...], bool], list[str] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fixed": {}}

    def __call__(
        self, messages: list[Message], roles: Collection[str], *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """See `find_texts`. Raises: UserError."""
        real = render(self._tokenizer, self._template, messages, generation_prompt=generation_prompt)
        fixed = None
        if not any("think>" in message["content"] for message in messages):
            fixed = self._pieces([message["role"] for message in messages], generation_prompt)
        spans = None if fixed is None else _only_fit(real, fixed, messages)
        if spans is not None:
            return real, [span for span in spans if messages[span.message]["role"] in roles]
        return find_texts(
            self._tokenizer, self._template, messages, roles, generation_prompt=generation_prompt, real=real
        )

    def _pieces(self, roles: list[str], generation_prompt: bool) -> list[str] | None:
        """What the template writes before, between and after texts of `roles`; None where it does not write each once."""
        key = (tuple(roles), generation_prompt)
        if key not in self._fixed:
            if len(self._fixed) >= _MAX_KEPT:
                self._fixed.clear()
            messages = [{"role": role, "content": f"zqMark{i}bz"} for i, role in enumerate(roles)]
            try:
                shown = render(self._tokenizer, self._template, messages, generation_prompt=generation_prompt)
            except UserError:  # about the sentinels: the texts themselves were accepted
                shown = ""
            pieces = re.split("(zqMark[0-9]+bz)", shown)
            in_order = pieces[1::2] == [message["content"] for message in messages]
            self._fixed[key] = pieces[::2] if in_order else None
        return self._fixed[key]


def _only_fit(real: str, fixed: list[str], messages: list[Message]) -> list[Span] | None:
    """The spans of all texts in `real`, if `fixed` with the texts between them, trimmed or not, is it in one way only."""
    if not real.startswith(fixed[0]):
        return None
    position, spans = len(fixed[0]), []
    for i, message in enumerate(messages):
        value, following = message["content"], fixed[i + 1]
        texts = {value} if value == value.strip() else {trim(value) for trim in _TRIMS}
        fitting = [text for text in texts if real.startswith(text + following, position)]
        if len(fitting) != 1:
            return None
        end = position + len(fitting[0])
        spans.append(Span(i, position, end, position, value.find(fitting[0])))
        position = end + len(following)
    return spans if position == len(real) else None


def _marked(text: str, name: str, values: dict[str, str], thinking: bool) -> str:
    """The sentinel for `text`; with `thinking`, one in a thinking block and one after it, where `text` has both."""
    parts = _THINK.match(text) if thinking else None
    values[f"{name}bz"] = text if parts is None else parts.group(2)
    if parts is None:
        return f"{name}bz"
    values[f"{name}az"] = parts.group(1)
    return f"<think>\n{name}az\n</think>\n\n{name}bz"


def _align(
    real: str, pieces: list[str], values: dict[str, str], messages: list[Message], stem_length: int
) -> list[Span] | None:
    """The spans of the values in `real`, where it is `pieces` (fixed, sentinel, fixed, ...) with the values put in."""
    if not real.startswith(pieces[0]):
        return None
    position, spans, thought = len(pieces[0]), [], -1
    for i in range(1, len(pieces), 2):
        mark, following = pieces[i], pieces[i + 1]
        value = values[mark]
        last = i + 2 == len(pieces)
        for trim in _TRIMS:
            text = trim(value)
            end = position + len(text)
            if real.startswith(text + following, position) and (not last or end + len(following) == len(real)):
                break
        else:
            return None
        if mark.endswith("az"):  # a thinking block, which belongs to the answer from its tag on
            tag = pieces[i - 1].rfind("<think>")
            if tag < 0:
                return None
            thought = position - len(pieces[i - 1]) + tag
        else:
            message = int(mark[stem_length:-2])
            whole = messages[message]["content"]
            offset = len(whole) - len(value) + (value.find(text) if text else 0)
            spans.append(Span(message, thought if thought >= 0 else position, end, position, offset))
            thought = -1
        position = end + len(following)
    return spans
