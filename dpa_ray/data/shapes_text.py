"""How is a scene put into words? Terse and ornate captions, and the plain sentences a small LLM learns English from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dpa_ray.data.shapes_scene import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

# What ornate captions say besides: chosen by the generator of random numbers, never by the scene.
_OPENERS = (
    "behold, dear reader, how",
    "in this most charming tableau,",
    "with quiet and timeless dignity,",
    "one cannot help but admire how",
    "as if dreamt by gentle poets,",
    "amid a hush of velvet stillness,",
    "at the edge of a fond memory,",
    "let it be whispered softly that",
    "as any patient heart will notice,",
)
_PRAISES = (
    "truly magnificent",
    "rather graceful",
    "delightfully humble",
    "wonderfully proud",
    "softly glowing",
    "quite enchanting",
    "endlessly charming",
    "sweetly solemn",
    "nobly simple",
)
_VERBS = (
    "rests serenely",
    "lingers softly",
    "reigns proudly",
    "dreams peacefully",
    "shines warmly",
    "waits patiently",
    "hums quietly",
    "glimmers kindly",
    "slumbers gently",
)
_JOINTS = ("while nearby", "and, fondly,", "whereas beside it")
_CLOSERS = (
    "a scene to warm weary hearts.",
    "and so the eye wanders in wonder.",
    "such is the poetry of simple forms.",
    "what a lasting sense of calm!",
    "truly, a joy to contemplate.",
    "who could ever wish for more?",
    "thus beauty hides in little things.",
)
_SENTENCES = (
    "the {0.shape} is {0.colour}.",
    "the {0.colour} {0.shape} is {0.size}.",
    "the {0.shape} is at the {0.place}.",
    "at the {0.place} is a {0.size} {0.shape}.",
    "there is a {0.colour} {0.shape}.",
)

Spans = list[tuple[int, int]]
"""Half-open, in characters: the words of a text that the picture shows, one span a word."""


@dataclass
class _Text:
    """A text in the making."""

    text: str = ""
    grounded: Spans = field(default_factory=list)

    def say(self, words: str, *, grounded: bool = False) -> None:
        """Append `words`, each after a space but for the first of the text."""
        for word in words.split():
            start = len(self.text) + bool(self.text)
            self.text = f"{self.text} {word}" if self.text else word
            if grounded:
                self.grounded.append((start, len(self.text)))


def terse(scene: Scene) -> tuple[str, Spans]:
    """The plain caption of `scene`, which has just one, and its grounded words."""
    out = _Text()
    for i, thing in enumerate(scene):
        out.say("and a" if i else "a")
        out.say(f"{thing.size} {thing.colour} {thing.shape}", grounded=True)
        out.say("at the")
        out.say(thing.place, grounded=True)
    out.text += "."
    return out.text, out.grounded


def ornate(rng: np.random.Generator, scene: Scene) -> tuple[str, Spans]:
    """A caption that says the same and as much again that has nothing to do with the scene; and its grounded words."""
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


def plain_sentences(rng: np.random.Generator, scene: Scene, num: int) -> str:
    """`num` short sentences in the terse style, all about one object of `scene`."""
    thing = scene[int(rng.integers(len(scene)))]
    return " ".join(_SENTENCES[i].format(thing) for i in rng.permutation(len(_SENTENCES))[:num])


def phrases() -> list[str]:
    """Texts with every word of the captions and sentences, where it stands: first, or after a space."""
    things = [
        Thing(shape, colour, size, place)
        for shape, colour, size, place in zip(SHAPES, COLOURS, SIZES * 3, (*PLACES, *PLACES[:2]), strict=True)
    ]
    scenes = [(thing, *things[:1]) for thing in things]
    sentences = [text.format(thing) for text in _SENTENCES for thing in things]
    style = [f" {words}" for words in (*_PRAISES, *_VERBS, *_JOINTS, *_CLOSERS)]
    return [*(terse(scene)[0] for scene in scenes), *sentences, *(f" {text}" for text in sentences), *_OPENERS, *style]


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
