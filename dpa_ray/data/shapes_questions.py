"""What can be asked about a scene without telling the answer? Questions that nobody without sight can do well on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from dpa_ray.data.shapes_scene import (
    COLOURS,
    COUNTS,
    PLACES,
    SHAPES,
    SIZES,
    Attribute,
    Scene,
    Split,
    draw_scene,
    possible,
)

Kind = Literal["colour", "shape", "place", "size", "exists", "count"]

NUMBERS = {1: "one", 2: "two", 3: "three"}
_TEXTS: dict[Kind, str] = {
    "colour": "what colour is the {}?",
    "shape": "what shape is at the {}?",
    "place": "where is the {}?",
    "size": "is the {} small or large?",
    "exists": "is there a {}?",
    "count": "how many objects are there?",
}


@dataclass(frozen=True)
class Question:
    """A question of one kind about `about` (a place for `shape`, nothing for `count`, else a shape), and its answer."""

    kind: Kind
    about: str
    answer: str

    @property
    def text(self) -> str:
        return _TEXTS[self.kind].format(self.about)


@cache
def one_round(split: Split) -> tuple[Question, ...]:
    """Questions for scenes of `split` in which every answer to a text stands as often as any other.

    Asked round by round, in whatever order, the majority answer per question text is right no more often than one of
    all possible answers picked by chance. Kinds with many possible answers come more often.
    """
    return (
        *(Question("colour", s, c) for s in SHAPES for c in COLOURS if possible(s, c, split)),
        *(Question("shape", p, s) for p in PLACES for s in SHAPES),
        *(Question("place", s, p) for s in SHAPES for p in PLACES),
        *(Question("size", s, z) for s in SHAPES for z in SIZES),
        *(Question("exists", s, answer) for s in SHAPES for answer in ("yes", "no")),
        *(Question("count", "", NUMBERS[num]) for num in COUNTS for _ in range(4)),  # as often as size and exists
    )


def scene_for(rng: np.random.Generator, question: Question, split: Split) -> Scene:
    """A random scene of `split` for which the answer is right, and the question unambiguous."""
    known: dict[Attribute, str] = {}
    if question.kind in ("colour", "place", "size"):
        known = {"shape": question.about, question.kind: question.answer}
    elif question.kind == "shape":
        known = {"place": question.about, "shape": question.answer}
    elif question.answer == "yes":
        known = {"shape": question.about}
    num = next((num for num in COUNTS if NUMBERS[num] == question.answer), None)
    absent = question.about if question.answer == "no" else None
    return draw_scene(rng, split, num_things=num, known=known, absent_shape=absent)


def follow_ups(rng: np.random.Generator, scene: Scene, first: Question, num: int) -> list[Question]:
    """At most `num` further questions about `scene`, none of which the ones before, with their answers, settle.

    Neither `exists` nor `count`: the objects spoken of before would help to guess.
    """
    candidates = [
        question
        for thing in scene
        for question in (
            Question("colour", thing.shape, thing.colour),
            Question("shape", thing.place, thing.shape),
            Question("place", thing.shape, thing.place),
            Question("size", thing.shape, thing.size),
        )
    ]
    told = {_tells(first)}
    chosen: list[Question] = []
    for question in (candidates[i] for i in rng.permutation(len(candidates))):
        if len(chosen) < num and _tells(question) not in told:
            chosen.append(question)
            told.add(_tells(question))
    return chosen


def _tells(question: Question) -> tuple[str, str]:
    """(attribute, shape of the object) that the question with its answer tells: what is there = where is it."""
    if question.kind == "shape":
        return "place", question.answer
    return question.kind, question.about
