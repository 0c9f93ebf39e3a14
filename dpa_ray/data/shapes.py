"""What is in `builtin:shapes`? A data set of pictures, captions and questions, made from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.shapes_scene import SHAPES, Scene, Split, draw_scene, picture
from dpa_ray.data import shapes_text
from dpa_ray.data.shapes_text import Question
from dpa_ray.recipe import SourceOptions

VERSION = 1
"""Of the generator: a change of what it makes must change this, which is part of the data's digest."""

_STREAMS = ("terse", "ornate", "qa", "text", "round")
_SPLITS = ("train", "heldout", "heldout_pairs")


def _rng(stream, split, *numbers):
    return np.random.default_rng((VERSION, _STREAMS.index(stream), _SPLITS.index(split), *numbers))


def generate(options: SourceOptions) -> Iterator[Sample]:
    for i in range(options.size):
        yield _qa(options, i) if options.style == "qa" else _caption(options, i)


def _caption(options, i):
    rng = _rng(options.style, options.split, options.seed, i)
    scene = draw_scene(rng, options.split)
    text, grounded = shapes_text.terse(scene) if options.style == "terse" else shapes_text.ornate(rng, scene)
    return _sample(
        options, i, [Turn("human", IMAGE_TOKEN), Turn("gpt", text)], picture(rng, scene), [(1, *s) for s in grounded]
    )


def scene_of(question: Question, split: Split, rng) -> Scene:
    num = {v: k for k, v in shapes_text.NUMBERS.items()}.get(question.answer) if question.kind == "count" else None
    absent = question.about if (question.kind, question.answer) == ("exists", "no") else None
    return draw_scene(rng, split, num_things=num, known=question.known, absent=absent)


from functools import cache
question_round=cache(shapes_text.question_round)
def question_of(options, i):
    round_ = question_round(options.split)
    number, place = divmod(i, len(round_))
    order = _rng("round", options.split, options.seed, number).permutation(len(round_))
    return round_[order[place]]


def _qa(options, i):
    rng = _rng("qa", options.split, options.seed, i)
    first = question_of(options, i)
    scene = scene_of(first, options.split, rng)
    asked = [first]
    if options.split == "train":
        asked += shapes_text.follow_ups(rng, scene, first, FOLLOW)
    turns, grounded = [], []
    for q in asked:
        turns += [Turn("human", q.text if turns else f"{IMAGE_TOKEN}\n{q.text}"), Turn("gpt", q.answer)]
        grounded.append((len(turns) - 1, 0, len(q.answer)))
    return _sample(options, i, turns, picture(rng, scene), grounded)


FOLLOW = 2


def _sample(options, i, turns, png, grounded):
    place = f"builtin:shapes/{options.style}/{options.split}/{options.seed}#{i}"
    return Sample(
        id=place.removeprefix("builtin:"),
        place=place,
        turns=turns,
        images=[ImageFile(f"{i:06}.png", png)],
        grounded=grounded,
    )


def pretraining_texts(seed: int, num: int) -> list[str]:
    out = []
    for i in range(num):
        rng = _rng("text", "train", seed, i)
        out.append(shapes_text.pretraining_text(rng, draw_scene(rng, "train")))
    return out


def pretraining_chats(seed: int, num: int, context=1) -> list[list[str]]:
    out = []
    o = SourceOptions(style="qa", seed=seed)
    for i in range(num):
        rng = _rng("text", "train", seed, i, 1)
        q = question_of(o, i)
        sc = scene_of(q, "train", rng)
        x = shapes_text.pretraining_chat(rng, sc, q)
        if context:
            x[0] = shapes_text.terse(sc)[0] + chr(10) + x[0]
        out.append(x)
    return out


def vocabulary_texts() -> list[str]:
    texts = []
    for style in ("terse", "ornate", "qa"):
        for split in _SPLITS:
            for s in generate(SourceOptions(style=style, split=split, size=200)):
                texts += [t.text for t in s.turns]
    return texts + pretraining_texts(0, 300)
