"""What is in `builtin:shapes`? Pictures with captions or questions, made from a seed alone; and text of the same world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data import shapes_text
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.shapes_questions import Question, follow_ups, one_round, scene_for
from dpa_ray.data.shapes_scene import Scene, Split, draw_scene, picture
from dpa_ray.data.shapes_text import ornate, plain_sentences, terse
from dpa_ray.recipe import SourceOptions

VERSION = 2
"""Of what the generator makes: raise it with every change, because data and models are kept under it."""

FOLLOW_UPS = 2  # questions after the first in a training conversation; held-out ones are single, each seen afresh

_STREAMS = ("terse", "ornate", "qa", "order", "text")
_SPLITS = get_args(Split)


def generate(options: SourceOptions, start: int = 0) -> Iterator[Sample]:
    """The samples `start` (0-based) to `options.size` of a set; sample i is the same whatever the size and start.

    `terse` and `ornate`: one caption. `qa`: questions with short answers, in train a few to a picture, elsewhere one.
    Scenes of the three splits differ, whatever their seeds (`shapes_scene.split_of`).
    """
    make = _conversation if options.style == "qa" else _caption
    for i in range(start, options.size):
        yield make(options, i)


def _caption(options: SourceOptions, i: int) -> Sample:
    rng = _rng(options.style, options.split, options.seed, i)
    scene = draw_scene(rng, options.split)
    text, spans = terse(scene) if options.style == "terse" else ornate(rng, scene)
    turns = [Turn("human", IMAGE_TOKEN), Turn("gpt", text)]
    return _sample(options, i, turns, [(1, start, end) for start, end in spans], picture(rng, scene))


def _conversation(options: SourceOptions, i: int) -> Sample:
    rng = _rng(options.style, options.split, options.seed, i)
    first = _first_question(options.split, options.seed, i)
    scene = scene_for(rng, first, options.split)
    asked = [first, *follow_ups(rng, scene, first, FOLLOW_UPS if options.split == "train" else 0)]
    turns = [turn for q in asked for turn in (Turn("human", q.text), Turn("gpt", q.answer))]
    turns[0].text = f"{IMAGE_TOKEN}\n{turns[0].text}"
    grounded = [(2 * k + 1, 0, len(question.answer)) for k, question in enumerate(asked)]
    return _sample(options, i, turns, grounded, picture(rng, scene))


def _first_question(split: Split, seed: int, i: int) -> Question:
    """Rounds one after another, each in an order of its own: any stretch of samples is nearly balanced."""
    questions = one_round(split)
    number, place = divmod(i, len(questions))
    return questions[_rng("order", split, seed, number).permutation(len(questions))[place]]


def _sample(
    options: SourceOptions, i: int, turns: list[Turn], grounded: list[tuple[int, int, int]], png: bytes
) -> Sample:
    name = f"{options.style}-{options.split}-{options.seed}-{i:06}"
    place = f"builtin:shapes {options.style} {options.split} seed {options.seed}#{i}"
    return Sample(name, place, turns, [ImageFile(f"{name}.png", png)], grounded)


def _rng(stream: str, split: Split, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((VERSION, _STREAMS.index(stream), _SPLITS.index(split), *numbers))


def pretraining_texts(seed: int, num: int) -> list[str | list[str]]:
    """What a small LLM learns its own manner of speaking from: terse texts, no picture in sight.

    A string is a text: a caption, or short sentences. A list is a conversation, turns of user and assistant by turns,
    in which the user describes a scene in the same terse words and then asks about it. Scenes are of the train split.
    """
    return [_pretraining_text(_rng("text", "train", seed, i), seed, i) for i in range(num)]


def _pretraining_text(rng: np.random.Generator, seed: int, i: int) -> str | list[str]:
    if i % 3 == 0:
        scene: Scene = draw_scene(rng, "train")
        return terse(scene)[0] if rng.random() < 0.5 else plain_sentences(rng, scene, 2)
    first = _first_question("train", seed, i)
    scene = scene_for(rng, first, "train")
    asked = [first, *follow_ups(rng, scene, first, 2)]
    turns = [text for question in asked for text in (question.text, question.answer)]
    turns[0] = f"{terse(scene)[0]}\n{turns[0]}"
    return turns


def vocabulary_texts() -> list[str]:
    """Texts with every word of every style and of `pretraining_texts`, where it can stand: first, or after a space."""
    questions = [text for split in _SPLITS for q in one_round(split) for text in (q.text, q.answer)]
    return [*shapes_text.phrases(), *dict.fromkeys(questions)]
