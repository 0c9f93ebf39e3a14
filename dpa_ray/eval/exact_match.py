"""How many held-out questions does a model answer exactly, and how many would be answered without sight?

Two baselines: the majority answer to each question text (of the held-out set itself, so it is the best that a blind
answer can do), and the model itself on *shuffled* images, each question with another sample's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


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


def majority_accuracy(questions: Sequence[Question]) -> float:
    """Share of questions that the most frequent answer to each question text gets right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.text][question.answer.strip()] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / max(1, len(questions))


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
        """Greedy answers, in the order of `questions`."""
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
        generated = self.model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **seen,
            do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=pad,
        )  # fmt: skip
        texts: list[str] = self.tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        return texts


def score(questions: Sequence[Question], answers: Sequence[str], shuffled: Sequence[str]) -> ExactMatch:
    """Accuracy and both baselines."""
    count = max(1, len(questions))
    right = sum(matches(a, q.answer) for a, q in zip(answers, questions, strict=True))
    blind = sum(matches(a, q.answer) for a, q in zip(shuffled, questions, strict=True))
    return ExactMatch(len(questions), right / count, blind / count, majority_accuracy(questions))
