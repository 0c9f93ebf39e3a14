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

RESERVED_PAIRS = frozenset(zip(SHAPES, COLOURS, strict=True))
"""(shape, colour) pairs that only the split heldout_pairs shows: one of each shape and of each colour."""

HELDOUT_FRACTION = 0.2
IMAGE_SIZE = 64  # pixels a side

_RGB = {"red": (240, 70, 70), "green": (50, 220, 90), "blue": (70, 110, 250), "yellow": (220, 195, 20),
        "purple": (185, 70, 200), "cyan": (20, 200, 210)}  # fmt: skip
GRID = 4
RL, RS, PLAY = 0.45, 0.28, 0.7
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


def possible(known: dict[Attribute, str], split: Split) -> bool:
    """Can an object with the attributes `known` stand in a scene of `split`?"""
    return split == "heldout_pairs" or (known.get("shape"), known.get("colour")) not in RESERVED_PAIRS


def draw_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    num_things: int | None = None,
    known: dict[Attribute, str] | None = None,
    absent: str | None = None,
) -> Scene:
    """A random scene of `split`, with one object that has the attributes `known` and none of shape `absent`.

    Numbers of objects are equally likely, and so are all values of the attributes that the split and the arguments
    leave free. `num_things` fixes the number. The arguments must leave a scene possible (see `possible`).
    """
    while True:
        num = int(rng.choice(COUNTS)) if num_things is None else num_things
        # So many tries for one number of objects, and not one, keeps the numbers equally likely although scenes of
        # more objects are refused more often; and not endlessly many, because of single objects few fit.
        for _ in range(64):
            scene = _draw(rng, num, known or {}, absent)
            if split_of(scene) == split:
                return scene


def _draw(rng: np.random.Generator, num: int, known: dict[Attribute, str], absent: str | None) -> Scene:
    columns = {}
    for name in ("shape", "colour", "place"):
        first = [known[name]] if name in known else []  # type: ignore[index]
        rest = [v for v in VALUES[name] if v not in first and v != absent]  # type: ignore[index]
        columns[name] = [*first, *(rest[i] for i in rng.permutation(len(rest)))]
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=num)]
    if "size" in known:
        sizes[0] = known["size"]
    things = [Thing(columns["shape"][i], columns["colour"][i], sizes[i], columns["place"][i]) for i in range(num)]
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def picture(rng: np.random.Generator, scene: Scene) -> bytes:
    """PNG bytes of `scene`, IMAGE_SIZE pixels a side, with a little random play in background, colours and positions."""
    scale, cell = _SUPERSAMPLE, IMAGE_SIZE / GRID
    tint = rng.integers(20, 50) + rng.integers(-6, 7, size=3)
    slope = rng.uniform(-8, 8, size=2)
    axis = np.linspace(-1, 1, IMAGE_SIZE)
    background = tint + (slope[0] * axis[:, None] + slope[1] * axis[None, :])[:, :, None]
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8)).resize(
        (IMAGE_SIZE * scale,) * 2, Image.Resampling.NEAREST
    )
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 2)
        radius = cell * (RL if thing.size == "large" else RS) * rng.uniform(0.95, 1.05)
        corner = np.array([column, row]) * (GRID // 2) + rng.integers(GRID // 2, size=2)
        x, y = (corner + 0.5) * cell + rng.uniform(-PLAY, PLAY, size=2)
        fill = tuple(int(c) for c in (np.array(_RGB[thing.colour]) + rng.integers(-12, 13, size=3)).clip(0, 255))
        _draw_shape(canvas, thing.shape, x * scale, y * scale, radius * scale, fill)
    out = io.BytesIO()
    image.reduce(scale).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    """Draw `shape` around (x, y) in about the square of half-width `r`."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(1, round(r * 0.42)))
    elif shape == "square":
        canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    elif shape == "cross":
        arm = 0.33 * r
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        raise ValueError(f"expected one of {', '.join(SHAPES)}, found {shape}")
