"""How is a scene put into words? Terse and ornate captions, and questions with their answers.

A text is built of pieces; those in a `Said` are what the picture shows, and become the grounded spans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dpa_ray.data.shapes_scene import COLOURS, COUNTS, PLACES, SHAPES, SIZES, Attribute, Scene, Split, possible

Kind = Literal["colour", "shape", "place", "size", "count", "exists"]

_OPENERS = (
    "behold, dear reader, how",
    "in this most charming little tableau,",
    "with quiet and timeless dignity,",
    "one cannot help but admire how",
    "as if dreamt up by a gentle poet,",
    "amid a hush of velvet stillness,",
)
_PRAISES = (
    "truly magnificent",
    "rather graceful",
    "delightfully humble",
    "wonderfully proud",
    "softly glowing",
    "utterly enchanting",
)
_VERBS = ("rests serenely", "lingers softly", "reigns proudly", "dreams peacefully", "shines warmly", "waits patiently")
_JOINTS = ("while nearby", "and, in sweet harmony,", "whereas, not without elegance,")
_CLOSERS = (
    "a scene to warm the weariest heart.",
    "and so the eye is led to wonder.",
    "such is the poetry of simple forms.",
    "what a lasting sense of calm and balance!",
    "truly, a joy to contemplate at leisure.",
)
NUMBERS = {1: "one", 2: "two", 3: "three"}
_QUESTIONS: dict[Kind, str] = {
    "colour": "what colour is the {}?",
    "shape": "what shape is at the {}?",
    "place": "where is the {}?",
    "size": "is the {} small or large?",
    "count": "how many objects are there?",
    "exists": "is there a {}?",
}


@dataclass
class _Text:
    """A text in the making and the spans of its grounded words."""

    text: str = ""
    grounded: list[tuple[int, int]] = field(default_factory=list)

    def say(self, words: str, *, grounded: bool = False) -> None:
        """Append `words`, after a space where one is due; if `grounded`, each of them is a span."""
        for word in words.split():
            if self.text:
                self.text += " "
            start = len(self.text)
            self.text += word
            if grounded:
                self.grounded.append((start, len(self.text)))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def terse(scene: Scene) -> tuple[str, list[tuple[int, int]]]:
    """The plain caption of `scene` and its grounded spans (half-open, in characters); one per scene."""
    out = _Text()
    for i, thing in enumerate(scene):
        if i:
            out.say("and")
        out.say("a")
        out.say(f"{thing.size} {thing.colour} {thing.shape}", grounded=True)
        out.say("at the")
        out.say(thing.place, grounded=True)
    out.text += "."
    return out.text, out.grounded


def ornate(rng: np.random.Generator, scene: Scene) -> tuple[str, list[tuple[int, int]]]:
    """A caption that says the same in as many words again, which `rng` chooses and the scene has no part in."""
    out = _Text()
    out.say(_pick(rng, _OPENERS))
    praises, verbs = rng.permutation(len(_PRAISES)), rng.permutation(len(_VERBS))
    for i, thing in enumerate(scene):
        if i:
            out.say(_pick(rng, _JOINTS))
        out.say(f"a {_PRAISES[praises[i]]}")
        out.say(f"{thing.size} {thing.colour} {thing.shape}", grounded=True)
        out.say(f"{_VERBS[verbs[i]]} at the")
        out.say(thing.place, grounded=True)
        out.text += "," if i + 1 < len(scene) else ";"
    out.say(_pick(rng, _CLOSERS))
    return out.text, out.grounded


@dataclass(frozen=True)
class Question:
    """A question of one kind about `about` (the value that names an object; empty for count), and its answer."""

    kind: Kind
    about: str
    answer: str

    @property
    def text(self) -> str:
        return _QUESTIONS[self.kind].format(self.about)

    @property
    def known(self) -> dict[Attribute, str]:
        """What one object of the scene must have for this answer to be right."""
        if self.kind == "colour":
            return {"shape": self.about, "colour": self.answer}
        if self.kind == "shape":
            return {"place": self.about, "shape": self.answer}
        if self.kind == "place":
            return {"shape": self.about, "place": self.answer}
        if self.kind == "size":
            return {"shape": self.about, "size": self.answer}
        return {"shape": self.about} if self.answer == "yes" else {}


def question_round(split: Split) -> list[Question]:
    """Questions among which all answers to one text stand equally often, that of an unwise guesser's included.

    Asked round by round, no text has an answer more likely than the others, whatever the number of samples.
    """
    return [
        *(Question("colour", s, c) for s in SHAPES for c in COLOURS if possible({"shape": s, "colour": c}, split)),
        *(Question("shape", p, s) for p in PLACES for s in SHAPES),
        *(Question("place", s, p) for s in SHAPES for p in PLACES),
        *(Question("size", s, z) for s in SHAPES for z in SIZES),
        *(Question("exists", s, a) for s in SHAPES for a in ("yes", "no")),
        *(Question("count", "", NUMBERS[n]) for n in COUNTS for _ in range(4)),  # as often as size and exists
    ]


def follow_ups(rng: np.random.Generator, scene: Scene, first: Question, num: int) -> list[Question]:
    """Up to `num` further questions about `scene`, none of which an earlier question and its answer would settle."""
    told = {_link(first, scene)}
    questions = []
    for thing in (scene[i] for i in rng.permutation(len(scene))):
        kinds = [
            Question("colour", thing.shape, thing.colour),
            Question("shape", thing.place, thing.shape),
            Question("place", thing.shape, thing.place),
            Question("size", thing.shape, thing.size),
        ]
        questions += [kinds[i] for i in rng.permutation(len(kinds))]
    questions = [questions[i] for i in rng.permutation(len(questions))]
    chosen: list[Question] = []
    for question in questions:
        link = _link(question, scene)
        if len(chosen) < num and link not in told:
            chosen.append(question)
            told.add(link)
    return chosen


def _link(question: Question, scene: Scene) -> tuple[str, str]:
    """(which pair of attributes, of the object of which shape) `question` and its answer tell; where and what-is-at alike."""
    shape = question.answer if question.kind == "shape" else question.about
    return ("place" if question.kind == "shape" else question.kind, shape)


def pretraining_text(rng: np.random.Generator, scene: Scene) -> str:
    """A text in the terse style about `scene`: its caption, or a short sentence or two about its objects."""
    if rng.random() < 0.5:
        return terse(scene)[0]
    thing = scene[int(rng.integers(len(scene)))]
    sentences = [
        f"the {thing.shape} is {thing.colour}.",
        f"the {thing.colour} {thing.shape} is {thing.size}.",
        f"the {thing.shape} is at the {thing.place}.",
        f"at the {thing.place} is a {thing.size} {thing.shape}.",
        f"there is a {thing.colour} {thing.shape}.",
    ]
    order = rng.permutation(len(sentences))[:2]
    return " ".join(sentences[i] for i in order)


def pretraining_chat(rng: np.random.Generator, scene: Scene, first: Question) -> list[str]:
    asked = [first, *follow_ups(rng, scene, first, 2)]
    return [t for q in asked for t in (q.text, q.answer)]
