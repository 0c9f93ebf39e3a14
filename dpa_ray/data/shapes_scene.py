"""What can be seen in the built-in data: scenes of one to three objects, which split each belongs to, their pictures.

The objects of one scene differ in shape, in colour and in place, so that each of these alone names an object.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout", "heldout_pairs"]
Attribute = Literal["shape", "colour", "size", "place"]

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
VALUES: dict[Attribute, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}
COUNTS = (1, 2, 3)
COUNT_SHARES = (0.6, 0.25, 0.15)
"""How often a scene has so many objects: mostly one, from which a small model learns to read attributes at all before
it can learn to tell objects apart."""

RESERVED_PAIRS = frozenset(zip(SHAPES, COLOURS, strict=True))
"""(shape, colour) pairs that only the split heldout_pairs shows: one of each shape and of each colour."""

HELDOUT_FRACTION = 0.2
IMAGE_SIZE = 64  # pixels a side

_RGB = {"red": (240, 70, 70), "green": (50, 220, 90), "blue": (70, 110, 250), "yellow": (220, 195, 20),
        "purple": (185, 70, 200), "cyan": (20, 200, 210)}  # fmt: skip
GRID = 4
RADIUS = {"small": 0.28, "large": 0.45}
PLAY = 0.7
_SUPERSAMPLE = 4  # drawn so much larger and averaged down: smooth edges


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    place: str


Scene = tuple[Thing, ...]
"""Objects in reading order (top left first), which makes a scene its own canonical form."""


def split_of(scene: Scene) -> Split:
    """The one split that may show `scene`, from its content alone: no seed can move a scene to another split."""
    if any((thing.shape, thing.colour) in RESERVED_PAIRS for thing in scene):
        return "heldout_pairs"
    digest = hashlib.sha256(repr([astuple(thing) for thing in scene]).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") < HELDOUT_FRACTION * 2**32 else "train"


def possible(shape: str, colour: str, split: Split) -> bool:
    """Can an object of this shape and colour stand in a scene of `split`?"""
    return split == "heldout_pairs" or (shape, colour) not in RESERVED_PAIRS


def draw_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    num_things: int | None = None,
    known: dict[Attribute, str] | None = None,
    absent_shape: str | None = None,
) -> Scene:
    """A random scene of `split` with one object that has the attributes `known`, and none of shape `absent_shape`.

    Whatever the split and the arguments leave free is drawn: the number of objects by COUNT_SHARES, every attribute
    evenly. They must leave a scene possible (see `possible`).
    """
    while True:
        num = int(rng.choice(COUNTS, p=COUNT_SHARES)) if num_things is None else num_things
        # Many tries for one number of objects: else those of which more scenes are refused would come less often. Not
        # endlessly many: a split may have no single object with the attributes `known`.
        for _ in range(64):
            scene = _draw(rng, num, known or {}, absent_shape)
            if split_of(scene) == split:
                return scene


def _draw(rng: np.random.Generator, num: int, known: dict[Attribute, str], absent_shape: str | None) -> Scene:
    shapes = _column(rng, "shape", known, absent_shape)
    colours, places = _column(rng, "colour", known), _column(rng, "place", known)
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=num)]
    sizes[0] = known.get("size", sizes[0])
    things = [Thing(shapes[i], colours[i], sizes[i], places[i]) for i in range(num)]
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def _column(
    rng: np.random.Generator, name: Attribute, known: dict[Attribute, str], absent: str | None = None
) -> list[str]:
    """All values of an attribute in random order, without `absent`; a known one first."""
    values = VALUES[name]
    drawn = [values[i] for i in rng.permutation(len(values)) if values[i] not in (known.get(name), absent)]
    return [known[name], *drawn] if name in known else drawn


def picture(rng: np.random.Generator, scene: Scene) -> bytes:
    """PNG bytes of `scene`, IMAGE_SIZE pixels a side, with a little play in background, colours, sizes and positions."""
    tint = int(rng.integers(20, 50)) + rng.integers(-6, 7, size=3)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(tint.tolist()))
    cell = IMAGE_SIZE / GRID
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 2)
        radius = cell * RADIUS[thing.size] * rng.uniform(0.95, 1.05)
        x, y = (np.array([column, row]) * (GRID - 1) + 0.5) * cell + rng.uniform(-PLAY, PLAY, size=2)
        fill = tuple((np.array(_RGB[thing.colour]) + rng.integers(-12, 13, size=3)).clip(0, 255).tolist())
        _paint(image, thing.shape, float(x), float(y), float(radius), fill)
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1)
    return out.getvalue()


def _paint(image: Image.Image, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    """Paint `shape` on `image` around (x, y), filling about the square of half-width `radius`; in pixels."""
    left, top, side = int(x - radius - 1), int(y - radius - 1), int(2 * radius + 4)
    mask = Image.new("L", (side * _SUPERSAMPLE,) * 2)
    _outline(ImageDraw.Draw(mask), shape, (x - left) * _SUPERSAMPLE, (y - top) * _SUPERSAMPLE, radius * _SUPERSAMPLE)
    image.paste(fill, (left, top), mask.reduce(_SUPERSAMPLE))


def _outline(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=255, width=max(1, round(r * 0.42)))
    elif shape == "square":
        canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=255)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)
    else:
        assert shape == "cross", shape
        arm = 0.33 * r
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
