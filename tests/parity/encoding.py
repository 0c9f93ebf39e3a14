"""How the method turns a LLaVA record into token ids, targets and pixels: written again, with loops and PIL alone.

text (stage 1): caption, "\\n". plain (stage 2): image, caption, "\\n". No EOS, the human turn dropped. chat (stage 3): the
tokenizer's own chat template; targets are the assistant's texts and their end-of-turn tokens. The tokenizer decides
whether a BOS stands before text and plain; in chat the template writes everything itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PLACEHOLDER = "<image>"
IMAGE = -1
"""Stands for one image feature in `Tokens.ids`: no row of any vocabulary."""


@dataclass
class Tokens:
    """One sample as tokens. `turns` has an assistant turn's number at each of its targets, None elsewhere."""

    ids: list[int] = field(default_factory=list)
    turns: list[int | None] = field(default_factory=list)

    def add(self, ids: list[int], turn: int | None = None) -> None:
        """Append tokens, all of them targets of `turn` or none a target."""
        self.ids += ids
        self.turns += [turn] * len(ids)

    @property
    def targets(self) -> list[int]:
        """Indices of the target tokens. The first token of all follows nothing and is never one."""
        return [j for j, turn in enumerate(self.turns) if turn is not None and j > 0]

    def turn_of_targets(self) -> list[int]:
        """The assistant turn of each of `targets`."""
        return [turn for j in self.targets if (turn := self.turns[j]) is not None]


def encode(
    tokenizer: Any, sample: dict[str, Any], template: str, num_image_tokens: int, max_length: int, date: str
) -> Tokens:
    """The sample under a template: text, plain or chat. Cut at `max_length` tokens, image tokens counted."""
    if template == "chat":
        sequence = _chat(tokenizer, sample, num_image_tokens, date)
    else:
        sequence = _caption(tokenizer, sample, num_image_tokens, with_image=template == "plain")
    return Tokens(sequence.ids[:max_length], sequence.turns[:max_length])


def _caption(tokenizer: Any, sample: dict[str, Any], num_image_tokens: int, *, with_image: bool) -> Tokens:
    (text,) = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
    names = sample.get("image", [])
    num_images = 1 if isinstance(names, str) else len(names)
    own = tokenizer("a")["input_ids"]
    sequence = Tokens()
    if own[0] == tokenizer.bos_token_id:
        sequence.add([own[0]])
    if with_image:
        sequence.add([IMAGE] * num_image_tokens * num_images)
    sequence.add(tokenizer(text + "\n", add_special_tokens=False)["input_ids"], turn=0)
    return sequence


def messages_of(sample: dict[str, Any]) -> list[dict[str, str]]:
    """The record as chat messages; a single placeholder goes to the start of its turn, followed by a newline."""
    turns = sample["conversations"]
    single = sum(turn["value"].count(PLACEHOLDER) for turn in turns) == 1
    messages = []
    for turn in turns:
        text = turn["value"]
        if single and PLACEHOLDER in text:
            text = PLACEHOLDER + "\n" + text.replace(PLACEHOLDER, "").strip()
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": text})
    return messages


def render(tokenizer: Any, messages: list[dict[str, str]], date: str, *, generation_prompt: bool = False) -> str:
    """The chat template's text, with the clock at `date`."""
    day = datetime.strptime(date, "%d %b %Y")
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=date, strftime_now=day.strftime
    )


def _chat(tokenizer: Any, sample: dict[str, Any], num_image_tokens: int, date: str) -> Tokens:
    messages = messages_of(sample)
    sequence, done, turn = Tokens(), "", 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:k], date, generation_prompt=True)
        whole = render(tokenizer, messages[: k + 1], date)
        assert whole.startswith(prompt), "the tests' own templates only ever append"
        assert prompt.startswith(done)
        _add_text(sequence, tokenizer, prompt[len(done) :], num_image_tokens)
        # Behind the prompt: the answer, the token that ends the turn, and whatever stands between two turns.
        tail = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        end = next(
            i for i, token in enumerate(tail) if token in tokenizer.all_special_ids or _is_added(tokenizer, token)
        )
        sequence.add(tail[: end + 1], turn)
        sequence.add(tail[end + 1 :])
        done, turn = whole, turn + 1
    return sequence


def _is_added(tokenizer: Any, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special


def _add_text(sequence: Tokens, tokenizer: Any, text: str, num_image_tokens: int) -> None:
    for i, part in enumerate(text.split(PLACEHOLDER)):
        if i:
            sequence.add([IMAGE] * num_image_tokens)
        sequence.add(tokenizer(part, add_special_tokens=False)["input_ids"])


def preprocess(file: Path, aspect: str, processor: dict[str, Any], image_size: int | None = None) -> np.ndarray:
    """(C, S, S) float64 pixels. `processor` is the tower's preprocessor_config: size, resample, mean and std.

    crop: the shorter side to S, then the middle. pad: to a square with the mean colour, then to S. stretch: both sides
    to S. Transparent pictures are laid on white.
    """
    given = {**(processor.get("size") or {}), **(processor.get("crop_size") or {})}
    size = image_size or given["height"]
    resample = Image.Resampling(processor["resample"])
    mean, std = np.array(processor["image_mean"]), np.array(processor["image_std"])
    picture = Image.open(file)
    if "A" in picture.getbands():
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    width, height = picture.size
    if aspect == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square.resize((size, size), resample)
    elif aspect == "crop":
        short, long = min(width, height), int(size * max(width, height) / min(width, height))
        picture = picture.resize((size, long) if width == short else (long, size), resample)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    else:
        picture = picture.resize((size, size), resample)
    pixels = np.asarray(picture, dtype=np.float64) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)
