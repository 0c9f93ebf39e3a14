"""How many held-out questions does a model answer exactly, and how many would be answered without sight?

Two baselines: the majority answer to each question text, found in one half of the set and tried on the other (where a
text is not there: the most frequent answer of all), and the model itself on *shuffled* images, each question with another
sample's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig


@dataclass(frozen=True)
class Question:
    """One assistant turn of a held-out sample."""

    sample: int  # number of the sample in the set
    text: str  # the human turn, without <image>
    answer: str
    input_ids: np.ndarray  # (T,) int64: everything before the answer, image tokens in place
    images: tuple[bytes, ...]  # encoded


@dataclass(frozen=True)
class ExactMatch:
    """Accuracies are fractions of `num_questions`."""

    num_questions: int
    accuracy: float
    shuffled: float
    majority: float

    @property
    def lead(self) -> float:
        """How far the model is ahead of the better baseline without sight."""
        return self.accuracy - max(self.shuffled, self.majority)


def matches(given: str, expected: str) -> bool:
    """Equal but for surrounding blanks."""
    return given.strip() == expected.strip()


def majority_accuracy(questions: Sequence[Question], seed: int = 0) -> float:
    """Share of questions that the most frequent answer to their text gets right, as the other half of the samples has it.

    In its own half a text that comes once would be its own majority. Answers that are equally frequent: the first by name.
    """
    samples = sorted({question.sample for question in questions})
    chosen = np.random.default_rng(seed).permutation(samples)[: len(samples) // 2]
    is_first = set(map(int, chosen))
    halves = [[q for q in questions if (q.sample in is_first) == side] for side in (True, False)]
    right = sum(_majority_right(there, here) for here, there in (halves, halves[::-1]))
    return right / max(1, len(questions))


def _majority_right(known: Sequence[Question], asked: Sequence[Question]) -> int:
    """How many of `asked` the majority answers of `known` get right."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    of_all: Counter[str] = Counter()
    for question in known:
        by_text[question.text][question.answer.strip()] += 1
        of_all[question.answer.strip()] += 1

    def answer(text: str) -> str | None:
        counter = by_text.get(text) or of_all
        return min(counter, key=lambda answer: (-counter[answer], answer), default=None)

    best = {text: answer(text) for text in {question.text for question in asked}}
    return sum(best[question.text] == question.answer.strip() for question in asked)


def with_shuffled_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Every question with the images of another sample that has as many of them (its own, where there is none)."""
    by_count: dict[int, dict[int, tuple[bytes, ...]]] = defaultdict(dict)
    for question in questions:
        by_count[len(question.images)].setdefault(question.sample, question.images)
    partner: dict[tuple[int, int], tuple[bytes, ...]] = {}
    generator = np.random.default_rng(seed)
    for count, samples in by_count.items():
        order = generator.permutation(sorted(samples))
        for here, there in zip(order, np.roll(order, 1), strict=True):  # a rotation of a permutation: never its own
            partner[count, int(here)] = samples[int(there)]
    return [replace(question, images=partner[len(question.images), question.sample]) for question in questions]


@dataclass(frozen=True)
class Answering:
    """What turns questions into answers."""

    model: Any  # LlavaForConditionalGeneration, as exported
    tokenizer: Any
    pixels: Callable[[bytes], np.ndarray]  # (C, H, W) float32 of one encoded image
    batch_size: int
    max_new_tokens: int
    device: torch.device

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question]) -> list[str]:
        """Greedy answers, in the order of `questions`: of the base LLM's own settings for generation (a penalty for
        repetition, say) none but the ends of a turn and the tokens that are no text."""
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].input_ids))  # like lengths together
        answers = [""] * len(questions)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, text in zip(chosen, self._batch([questions[i] for i in chosen]), strict=True):
                answers[index] = text
        return answers

    def _batch(self, questions: list[Question]) -> list[str]:
        length = max(len(q.input_ids) for q in questions)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(questions), length), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):  # padded on the left: every answer starts at the same place
            ids[row, length - len(question.input_ids) :] = torch.from_numpy(question.input_ids)
            mask[row, length - len(question.input_ids) :] = 1
        images = [self.pixels(image) for question in questions for image in question.images]
        weight = self.model.model.multi_modal_projector.linear_1.weight
        # `generate` runs the tower on a pixel_values that is None
        seen = {"pixel_values": torch.from_numpy(np.stack(images)).to(self.device, weight.dtype)} if images else {}
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(  # as an argument it would be filled up from the model's
            do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=pad,
            eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id, suppress_tokens=own.suppress_tokens,
        )  # fmt: skip
        try:
            generated = self.model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **seen)
        finally:
            self.model.generation_config = own
        texts: list[str] = self.tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        return texts


def score(questions: Sequence[Question], answers: Sequence[str], shuffled: Sequence[str]) -> ExactMatch:
    """Accuracy and both baselines."""
    count = max(1, len(questions))
    right = sum(matches(a, q.answer) for a, q in zip(answers, questions, strict=True))
    blind = sum(matches(a, q.answer) for a, q in zip(shuffled, questions, strict=True))
    return ExactMatch(len(questions), right / count, blind / count, majority_accuracy(questions))
