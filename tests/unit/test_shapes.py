"""Are built-in samples true to their pictures, the same for the same seed, fair to ask, and never in two splits?"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data import shapes
from dpa_ray.data.sample import Sample
from dpa_ray.recipe import SourceOptions

STYLES = ("terse", "ornate", "qa")
SPLITS = ("train", "heldout", "heldout_pairs")
COLOURS = {"red": (240, 70, 70), "green": (50, 220, 90), "blue": (70, 110, 250), "yellow": (220, 195, 20),
           "purple": (185, 70, 200), "cyan": (20, 200, 210)}  # fmt: skip
INSIDE = {  # is the point (u, v) of the square of half-width 1 inside? v grows downwards
    "circle": lambda u, v: u**2 + v**2 < 1,
    "square": lambda u, v: (abs(u) < 1) & (abs(v) < 1),
    "triangle": lambda u, v: (2 * abs(u) < 1 + v) & (v < 1),
    "cross": lambda u, v: ((abs(u) < 0.33) & (abs(v) < 1)) | ((abs(v) < 0.33) & (abs(u) < 1)),
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.58**2),
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
ATTRIBUTE_WORDS = {*COLOURS, *INSIDE, "small", "large", "top", "bottom", "left", "right"}

Objects = frozenset[tuple[str, str, str, str]]
"""(shape, colour, size, place) of each object."""


@cache
def samples(style: Any, split: Any = "train", seed: int = 0, size: int = 300) -> list[Sample]:
    return list(shapes.generate(SourceOptions(style=style, split=split, seed=seed, size=size)))


def objects_in(sample: Sample) -> Objects:
    """What the picture shows, from its pixels alone."""
    pixels = np.asarray(Image.open(io.BytesIO(sample.images[0].data)), dtype=float)
    assert pixels.ndim == 3
    background = np.median(pixels.reshape(-1, 3), axis=0)
    half = len(pixels) // 2
    found = set()
    for number, place in enumerate(PLACES):
        row, column = divmod(number, 2)
        quarter = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] - background
        if np.abs(quarter).max() > 25:
            found.add((*_object(quarter, background), place))
    return frozenset(found)


def _object(quarter: np.ndarray, background: np.ndarray) -> tuple[str, str, str]:
    """(shape, colour, size) of the one object in `quarter`, (H, W, 3), of which the background has been taken away."""
    full = quarter.reshape(-1, 3)[np.abs(quarter).sum(-1).argmax()]
    colour = min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - background - full).sum()))
    cover = (quarter @ full / (full @ full)).clip(0, 1)
    rows, columns = (np.flatnonzero((cover > 0.4).any(axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    radius = max(height, width) / 2
    cover = np.pad(cover, 2)[rows[0] : rows[-1] + 5, columns[0] : columns[-1] + 5]  # and two pixels around
    y, x = (((np.arange(4 * n) + 0.5) / 4 - n / 2) for n in cover.shape)  # four points a pixel, either way

    def likeness(shape: str, radius: float) -> float:
        u, v = np.meshgrid(x / radius, y / radius)
        ideal = INSIDE[shape](u, v).reshape(height + 4, 4, width + 4, 4).mean((1, 3))
        return float(np.corrcoef(ideal.ravel(), cover.ravel())[0, 1])

    shape = max(INSIDE, key=lambda name: max(likeness(name, radius + more) for more in (-0.6, -0.2, 0.2, 0.6)))
    return shape, colour, "large" if radius > 5.2 else "small"


def objects_told(caption: str) -> Objects:
    found = re.findall(r"(small|large) (\w+) (\w+) (?:\w+ \w+ )?at the (top|bottom) (left|right)", caption)
    return frozenset((shape, colour, size, f"{y} {x}") for size, colour, shape, y, x in found)


def answers(sample: Sample) -> list[tuple[str, str]]:
    """(question, answer) of each pair of turns."""
    texts = [turn.text.removeprefix(f"{IMAGE_TOKEN}\n") for turn in sample.turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def right_answer(question: str, scene: Objects) -> str:
    """From the words of the question; the one answer, or a failed assertion where it is ambiguous."""
    if question == "how many objects are there?":
        return {1: "one", 2: "two", 3: "three"}[len(scene)]
    word = next(w for w in re.findall(r"(?:top|bottom) \w+|\w+", question) if w in INSIDE or w in PLACES)
    meant = [thing for thing in scene if word in thing]
    if question == f"is there a {word}?":
        return "yes" if meant else "no"
    ((shape, colour, size, place),) = meant
    return {
        f"what colour is the {word}?": colour,
        f"what shape is at the {word}?": shape,
        f"where is the {word}?": place,
        f"is the {word} small or large?": size,
    }[question]


# The same again


@pytest.mark.parametrize("style", STYLES)
def test_a_sample_depends_on_its_number_and_not_on_size_or_start(style: str) -> None:
    more = samples(style, size=300)
    fewer = list(shapes.generate(SourceOptions(style=style, size=130), start=120))  # type: ignore[arg-type]
    assert fewer == more[120:130]


@pytest.mark.parametrize("style", STYLES)
def test_another_seed_makes_other_samples(style: str) -> None:
    pairs = zip(samples(style), samples(style, seed=1), strict=True)
    assert sum(a.images[0].data == b.images[0].data for a, b in pairs) == 0


def test_ids_and_file_names_are_unique_over_sets() -> None:
    sets = [samples(style, split, seed) for style in STYLES for split in SPLITS for seed in (0, 1)]
    ids = [sample.id for one in sets for sample in one]
    names = [sample.images[0].name for one in sets for sample in one]
    assert len(set(ids)) == len(ids) == len(set(names))


# True to the picture


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("style", ["terse", "ornate"])
def test_a_caption_tells_what_the_picture_shows(style: str, split: str) -> None:
    for sample in samples(style, split):
        assert [turn.role for turn in sample.turns] == ["human", "gpt"]
        assert sample.turns[0].text == IMAGE_TOKEN
        assert objects_told(sample.turns[1].text) == objects_in(sample)


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_is_the_one_that_the_picture_gives(split: str) -> None:
    for sample in samples("qa", split):
        assert [turn.role for turn in sample.turns] == ["human", "gpt"] * (len(sample.turns) // 2)
        assert [IMAGE_TOKEN in turn.text for turn in sample.turns] == [True] + [False] * (len(sample.turns) - 1)
        for question, answer in answers(sample):
            assert answer == right_answer(question, objects_in(sample))


def test_scenes_have_one_to_three_objects_and_every_attribute() -> None:
    scenes = [objects_in(sample) for sample in samples("terse")]
    assert set(map(len, scenes)) == {1, 2, 3}
    assert {word for scene in scenes for thing in scene for word in thing} == {
        *COLOURS,
        *INSIDE,
        *PLACES,
        "small",
        "large",
    }


@pytest.mark.parametrize("style", STYLES)
def test_grounded_spans_are_the_words_that_the_picture_gives(style: str) -> None:
    for sample in samples(style):
        spans: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for turn, start, end in sample.grounded:
            spans[turn].add((start, end))
        for number, turn in enumerate(sample.turns):
            if turn.role == "human":
                assert not spans[number]
            elif style == "qa":
                assert spans[number] == {(0, len(turn.text))}
            else:
                words = {m.span() for m in re.finditer(r"\w+", turn.text) if m.group() in ATTRIBUTE_WORDS}
                assert spans[number] == words


def test_half_of_an_ornate_caption_has_nothing_to_do_with_the_picture() -> None:
    pairs = [(sample.turns[1].text, len(sample.grounded)) for sample in samples("ornate")]
    assert np.mean([grounded / len(text.split()) for text, grounded in pairs]) < 0.4
    wordings = {re.sub("|".join(ATTRIBUTE_WORDS), "_", text) for text, _ in pairs}
    assert len(wordings) > 0.9 * len(pairs)  # a terse caption has but three


# Splits


@cache
def scenes_of(split: str) -> frozenset[Objects]:
    """Of two seeds; captions tell a scene as well as the picture does (see above)."""
    told = {objects_told(sample.turns[1].text) for seed in (0, 1) for sample in samples("terse", split, seed, 1200)}
    return frozenset(told | {objects_in(sample) for seed in (0, 1) for sample in samples("qa", split, seed)})


def test_splits_share_no_scene_whatever_their_seeds() -> None:
    scenes = {split: scenes_of(split) for split in SPLITS}
    for one, other in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert not scenes[one] & scenes[other]


def test_the_hard_split_shows_in_every_scene_a_pair_that_others_never_show() -> None:
    def pairs(scene: Objects) -> set[tuple[str, str]]:
        return {thing[:2] for thing in scene}

    known = {pair for split in ("train", "heldout") for scene in scenes_of(split) for pair in pairs(scene)}
    assert len(known) == 30  # of 36: each shape and each colour is known, but for one pair
    assert all(pairs(scene) - known for scene in scenes_of("heldout_pairs"))


# Fair to ask


def majority_shares(split: str, size: int) -> dict[str, float]:
    """By question text: the share of its most frequent answer."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples("qa", split, 0, size):
        for question, answer in answers(sample):
            counts[question][answer] += 1
    total = sum(c.total() for c in counts.values())
    shares = {question: max(c.values()) / c.total() for question, c in counts.items()}
    return {**shares, "": sum(max(c.values()) for c in counts.values()) / total}


@pytest.mark.parametrize("split", ["heldout", "heldout_pairs"])
def test_majority_answers_are_hardly_better_than_chance_in_a_small_set_already(split: str) -> None:
    """Chance: 1/5 (1/6) for colours, 1/6 for shapes, 1/4 for places, 1/3 for numbers, 1/2 for sizes and yes or no."""
    shares = majority_shares(split, 500)
    assert shares[""] < 0.33
    limits = {"what colour": 0.3, "what shape": 0.25, "where": 0.35, "how many": 0.4, "is": 0.6}
    for question, share in shares.items():
        assert share <= next((limit for start, limit in limits.items() if question.startswith(start)), 1), question


def test_training_answers_are_balanced_too_in_all_turns() -> None:
    shares = majority_shares("train", 3000)
    assert shares[""] < 0.34
    assert max(shares.values()) < 0.6


def test_held_out_conversations_have_one_question_and_training_ones_several() -> None:
    assert {len(sample.turns) for split in SPLITS[1:] for sample in samples("qa", split)} == {2}
    numbers = [len(sample.turns) // 2 for sample in samples("qa")]
    assert max(numbers) == 1 + shapes.FOLLOW_UPS
    assert np.mean(numbers) > 1 + 0.8 * shapes.FOLLOW_UPS


def test_no_question_is_settled_by_what_was_said_before() -> None:
    """Not asked again, not asked in reverse (where is X / what is there), nothing counted after objects were named."""
    for sample in samples("qa", size=1000):
        told: set[tuple[str, str]] = set()
        spoken: set[str] = set()
        for number, (question, answer) in enumerate(answers(sample)):
            words = set(re.findall(r"\w+", f"{question} {answer}")) & set(INSIDE)
            kind = "place" if question.startswith(("where", "what shape")) else question.split()[1]
            assert number == 0 or not question.startswith("how many")
            assert not (question.startswith("is there") and words & spoken)
            for shape in words:
                assert (kind, shape) not in told
                told.add((kind, shape))
            spoken |= words


# Text without pictures


def test_pretraining_texts_are_terse_and_depend_on_seed_and_number_alone() -> None:
    texts = shapes.pretraining_texts(0, 300)
    assert texts[:100] == shapes.pretraining_texts(0, 100)
    assert texts != shapes.pretraining_texts(1, 300)
    flat = " ".join(text if isinstance(text, str) else " ".join(text) for text in texts)
    long_words = {word for sample in samples("ornate") for word in re.findall(r"\w{7,}", sample.turns[1].text)}
    assert not set(re.findall(r"\w+", flat)) & (long_words - ATTRIBUTE_WORDS)
    assert any(isinstance(text, list) for text in texts)
    assert all(len(text) % 2 == 0 for text in texts if isinstance(text, list))


def test_pretraining_texts_never_tell_of_a_reserved_pair() -> None:
    known = {thing[:2] for sample in samples("terse", size=1000) for thing in objects_told(sample.turns[1].text)}
    texts = [text for text in shapes.pretraining_texts(0, 2000) if isinstance(text, str)]
    told = {thing[:2] for text in texts for thing in objects_told(text)}
    assert told
    assert told <= known
