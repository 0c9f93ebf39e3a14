"""Which figures does a report have? Each is a Vega-Lite specification with its data as a table beside it.

Data go in under names of our own (`x`, `series`), never as field names or expressions: keys and words that come from
recipes and captions may hold anything. Their order is a scale's domain: Vega-Lite makes an expression of a `sort`, in which Vega
takes the word "if" for its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
HEIGHT, ROW = 260, 34
"""Pixels: of a plot, and of a row of one that has rows."""

TICKS = {"tickCount": {"expr": "ceil(width / 80)"}}
"""Of an axis along the page: few enough to be read on a narrow one."""

AUTOSIZE = {"type": "fit-x", "contains": "padding"}

Spec = dict[str, Any]
Cell = str | float | int | None


@dataclass(frozen=True)
class Figure:
    """A figure, and what it shows as text."""

    name: str  # unique in the page, of letters, digits and hyphens
    title: str
    spec: Spec
    columns: tuple[str, ...] = ()
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    note: str = ""
    data_at: tuple[str, str] | None = None  # (id, name) of the table in the page that has its data already


@dataclass(frozen=True)
class Curve:
    """One line of a figure: y over x, in the order of x; None where there is no value."""

    name: str
    points: list[tuple[float, float | None]]


def thinned(curve: Curve, most: int, length: int = 0) -> Curve:
    """At most about `most` points: means of x and y over equal stretches; None only where a stretch has no value.

    The stretches with the curve's highest and lowest value have these instead, so that a spike of one step stays.

    Args:
        length: points of the longest of several curves that are to have the same stretches, and so the same x: what is left
            over at a curve's end is then put to the stretch before it, or taken for a whole one.
    """
    size = max(1, math.ceil(max(length, len(curve.points)) / most))
    if size == 1:
        return curve
    every = [y for _, y in curve.points if y is not None]
    ends = (max(every), min(every)) if every else ()
    starts = list(range(0, len(curve.points), size))
    left_over = len(curve.points) - starts[-1] if starts else 0
    if length and len(starts) > 1 and 2 * left_over < size:
        starts.pop()
    points: list[tuple[float, float | None]] = []
    for start, stop in zip(starts, [*starts[1:], len(curve.points)], strict=True):
        part = curve.points[start:stop]
        values = [y for _, y in part if y is not None]
        x = sum(x for x, _ in part) / len(part)
        if length and 2 * len(part) >= size:  # the middle of the whole stretch, for steps that follow each other
            x = part[0][0] + (size - 1) / 2
        mean = sum(values) / len(values) if values else None
        y = next((y for y in ends if y in values), mean)
        points.append((round(x, 1), None if y is None else float(f"{y:.5g}")))
    return Curve(curve.name, points)


def curves(
    name: str, title: str, lines: Sequence[Curve], *, x: str, y: str, marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Figure:  # fmt: skip
    """Lines over a common x, told apart by colour and dash; `marks` are upright rules with a text."""
    values = [{"x": at, "y": value, "series": line.name} for line in lines for at, value in line.points]
    order = [line.name for line in lines]
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {
                "type": "line",
                "tooltip": True,
                "point": max((len(line.points) for line in lines), default=0) < 3,
            },
            "encoding": {
                "x": {
                    "field": "x",
                    "type": "quantitative",
                    "title": x,
                    "axis": {**TICKS, "tickMinStep": 1},
                },
                "y": {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": False}},
                "color": {"field": "series", "type": "nominal", "scale": {"domain": order}, "title": None},
                "strokeDash": {"field": "series", "type": "nominal", "scale": {"domain": order}, "title": None},
            },
        }
    ]
    if marks:
        layers.append(_rules([{"x": at, "text": text} for at, text in marks]))
    by_x: dict[float, dict[str, float | None]] = {}
    for line in lines:
        for at, value in line.points:
            by_x.setdefault(at, {})[line.name] = value
    rows: list[tuple[Cell, ...]] = [(at, *(found.get(n) for n in order)) for at, found in sorted(by_x.items())]
    return Figure(name, title, whole(layers), (x, *order), rows, note)


def gain_histogram(
    name: str, title: str, edges: Sequence[float], counts: Mapping[str, Sequence[float]], *,
    bounds: tuple[float, float] | None, note: str,
) -> Figure:  # fmt: skip
    """p - q of targets as fractions per bin, for each of `counts` by name; `bounds`: the clamp, where it is one of p - q."""
    shares = {series: [c / max(1, sum(found)) for c in found] for series, found in counts.items()}
    bins = list(zip(edges[:-1], edges[1:], strict=True))
    rows: list[tuple[Cell, ...]] = [
        (f"{low:.3f} to {high:.3f}", *(round(y, 5) for y in here))
        for (low, high), *here in zip(bins, *shares.values(), strict=True)
        if any(here)
    ]
    order = list(counts)
    x_scale = {"type": "pow", "exponent": 0.5, "domain": [edges[0], edges[-1]]}
    encoding: Spec = {
        "x": {
            "field": "x", "type": "quantitative", "title": "p − q (narrower bins near 0)", "scale": x_scale,
            "axis": {"values": [-1, -0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5, 1], "format": "~"},
        },
        "y": {
            "field": "y", "type": "quantitative", "title": "share of targets", "stack": None,
            "scale": {"type": "sqrt", "domainMin": 0}, "axis": {"format": "%"},
        },
        "color": {"field": "series", "type": "nominal", "scale": {"domain": order}, "title": None},
    }  # fmt: skip
    layers: list[Spec] = []
    for series, found in shares.items():
        values = [{"x": low, "x2": high, "y": y, "series": series} for (low, high), y in zip(bins, found, strict=True)]
        if series == order[-1]:  # the latest as bars, the others as lines over them
            bar = {"type": "bar", "tooltip": True, "fillOpacity": 0.6}
            bars = {**encoding, "x2": {"field": "x2"}, "y2": {"datum": 0}}
            layers.insert(0, {"data": {"values": values}, "mark": bar, "encoding": bars})
        else:
            values.append({"x": edges[-1], "y": found[-1], "series": series})
            line = {"type": "line", "interpolate": "step-after"}
            layers.append({"data": {"values": values}, "mark": line, "encoding": encoding})
    if bounds is not None:
        marks = [{"x": bounds[0], "text": f"lower {bounds[0]:g}"}, {"x": bounds[1], "text": f"upper {bounds[1]:g}"}]
        layers.append(_rules(marks, x_scale))
    return Figure(name, title, whole(layers), ("p − q", *order), rows, note)


def time_spent(
    name: str, title: str, parts: Mapping[str, Mapping[str, float]], *, order: Sequence[str], note: str
) -> Figure:
    """Seconds by part of each stage, as bars in the order of the stages, each beginning where the last one ended; the parts
    in their `order`, others behind them."""
    every = dict.fromkeys(kind for found in parts.values() for kind, s in found.items() if s > 0)
    kinds = sorted(every, key=lambda kind: order.index(kind) if kind in order else len(order))
    values, at = [], 0.0
    for stage, found in parts.items():
        for kind in kinds:
            if (seconds := found.get(kind, 0.0)) > 0:
                values.append({"stage": stage, "part": kind, "x": at, "x2": at + seconds, "seconds": seconds})
                at += seconds
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "y": {"field": "stage", "type": "nominal", "sort": list(parts), "title": None},
                "x": {"field": "x", "type": "quantitative", "title": "seconds", "axis": TICKS},
                "x2": {"field": "x2"},
                "color": {"field": "part", "type": "nominal", "sort": kinds, "title": None},
            },
        }
    ]
    rows: list[tuple[Cell, ...]] = [
        (stage, *(round(found.get(kind, 0.0), 1) for kind in kinds), round(sum(found.values()), 1))
        for stage, found in parts.items()
    ]
    spec = whole(layers, height=ROW * len(parts))
    return Figure(name, title, spec, ("stage", *(f"{kind}, s" for kind in kinds), "in all, s"), rows, note)


def heat_map(
    name: str, title: str, keys: Sequence[str], scores: Sequence[str], points: Sequence[Sequence[float | None]], *,
    data_at: tuple[str, str],
) -> Figure:  # fmt: skip
    """The mean of a score over two settings, all three to be chosen in the page.

    Args:
        keys, scores: names of the columns of `points`, settings first; at least two settings and one score.
    """
    names = [*keys, *scores]
    values = [{f"k{i}": value for i, value in enumerate(point)} for point in points]
    fields = [f"k{i}" for i in range(len(names))]

    def choice(param: str, text: str, value: int, among: slice) -> Spec:
        bind = {"input": "select", "options": fields[among], "labels": names[among], "name": text}
        return {"name": param, "value": fields[value], "bind": bind}

    settings, found = slice(0, len(keys)), slice(len(keys), None)
    text = {"type": "text", "fontWeight": "bold"}
    shown = {"field": "score", "type": "quantitative", "format": ".3~r"}
    spec = {
        "$schema": SCHEMA, "width": "container", "height": HEIGHT, "autosize": AUTOSIZE, "data": {"values": values},
        "params": [
            choice("across", "across", 0, settings),
            choice("upwards", "upwards", 1, settings),
            choice("colour", "colour", len(keys), found),
        ],
        "transform": [
            {"calculate": "datum[across]", "as": "x"},
            {"calculate": "datum[upwards]", "as": "y"},
            {"calculate": "datum[colour]", "as": "score"},
            {"filter": "isValid(datum.x) && isValid(datum.y) && isValid(datum.score)"},
            {"aggregate": [{"op": "mean", "field": "score", "as": "score"}, {"op": "count", "as": "trials"}],
             "groupby": ["x", "y"]},
        ],
        "encoding": {
            "x": {"field": "x", "type": "ordinal", "title": None, "axis": {"labelAngle": 0}},
            "y": {"field": "y", "type": "ordinal", "title": None, "sort": "descending"},
        },
        "layer": [
            {
                "mark": {"type": "rect", "tooltip": True},
                "encoding": {"color": {"field": "score", "type": "quantitative", "title": None,
                                       "legend": {"orient": "right", "gradientLength": HEIGHT - 40}}},
            },
            # twice, so that it can be read on every colour: its outline first
            {"mark": {**text, "stroke": "black", "strokeWidth": 3}, "encoding": {"text": shown}},
            {"mark": {**text, "fill": "white"}, "encoding": {"text": shown}},
        ],
    }  # fmt: skip
    return Figure(name, title, spec, note="Each cell is the mean over the trials that have it.", data_at=data_at)


def parallel_coordinates(
    name: str,
    title: str,
    axes: Sequence[str],
    trials: Sequence[tuple[str, Sequence[Cell]]],
    *,
    data_at: tuple[str, str],
) -> Figure:
    """A line per trial through its settings and scores, one axis each, coloured by the last; words are ranked by name."""
    lines, top, bottom = [], [], []
    names = short(axes)
    for column, axis in enumerate(names):
        found = [values[column] for _, values in trials if values[column] is not None]
        scale = _Scale.of(found)
        if found:
            top.append({"axis": axis, "y": 1, "text": scale.last})
            bottom.append({"axis": axis, "y": 0, "text": scale.first})
        for trial, values in trials:
            value, last = values[column], values[-1]
            if value is not None and last is not None:
                lines.append({"trial": trial, "axis": axis, "y": scale(value), "value": value, "score": last})
    across = {
        "field": "axis", "type": "nominal", "scale": {"domain": names}, "title": None,
        "axis": {"labelAngle": -25, "labelPadding": 18, "domain": False, "ticks": False, "grid": True, "labelLimit": 130},
    }  # fmt: skip
    upright = {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1]}}
    ends = {"x": across, "y": upright, "text": {"field": "text"}}
    layers: list[Spec] = [
        {
            "data": {"values": lines},
            "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "fields": ["trial"]}}],
            "mark": {"type": "line", "tooltip": True, "strokeWidth": 2, "point": {"size": 40}},
            "encoding": {
                "x": across,
                "y": upright,
                "detail": {"field": "trial"},
                "color": {
                    "field": "score", "type": "quantitative", "title": names[-1],
                    "legend": {"type": "gradient", "direction": "horizontal"},
                },
                "opacity": {"condition": {"param": "near", "value": 1}, "value": 0.25},
                "tooltip": [{"field": "trial"}, {"field": "axis"}, {"field": "value"}],
            },
        },
        {"data": {"values": top}, "mark": {"type": "text", "dy": -6, "baseline": "bottom"}, "encoding": ends},
        {"data": {"values": bottom}, "mark": {"type": "text", "dy": 6, "baseline": "top"}, "encoding": ends},
    ]  # fmt: skip
    spec = whole(layers, height=HEIGHT + 40)
    return Figure(name, title, spec, note="Point at a line to bring it out.", data_at=data_at)


@dataclass(frozen=True)
class _Scale:
    """Places from 0 to 1 of numbers, or of words in their order."""

    low: float
    high: float
    words: tuple[str, ...] | None
    first: str
    last: str

    @classmethod
    def of(cls, found: Sequence[Cell]) -> _Scale:
        if any(isinstance(value, str) for value in found):
            words = tuple(sorted({str(value) for value in found}))
            return cls(0, len(words) - 1, words, words[0], words[-1])
        numbers = [float(value) for value in found if value is not None] or [0.0]
        return cls(min(numbers), max(numbers), None, f"{min(numbers):.4g}", f"{max(numbers):.4g}")

    def __call__(self, value: Cell) -> float:
        number = float(value or 0) if self.words is None else self.words.index(str(value))
        return 0.5 if self.high == self.low else (number - self.low) / (self.high - self.low)


def short(keys: Sequence[str]) -> list[str]:
    """Dotted keys by their last two parts, or as many more as tell them apart."""

    def last(key: str, num: int) -> str:
        return ".".join(key.split(".")[-num:])

    most = max((key.count(".") + 1 for key in keys), default=1)
    found = []
    for key in keys:
        alone = (n for n in range(2, most + 1) if [last(k, n) for k in keys].count(last(key, n)) == 1)
        found.append(last(key, next(alone, most)))
    return found


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval."""

    name: str
    middle: float
    low: float
    high: float


def intervals(name: str, title: str, found: Sequence[Interval], *, x: str) -> Figure:
    """Differences as points with their intervals, and a rule at 0: an interval across it shows no difference."""
    values = [{"name": i.name, "x": i.middle, "low": i.low, "high": i.high} for i in found]
    y = {"field": "name", "type": "nominal", "scale": {"domain": [i.name for i in found]}, "title": None}
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {"type": "rule", "strokeWidth": 3},
            "encoding": {
                "y": y,
                "x": {"field": "low", "type": "quantitative", "title": x, "axis": TICKS},
                "x2": {"field": "high"},
            },
        },
        {
            "data": {"values": values},
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "tooltip": True},
            "encoding": {"y": y, "x": {"field": "x", "type": "quantitative"}},
        },
        {
            "data": {"values": [{"x": 0}]},
            "mark": {"type": "rule", "strokeDash": [4, 4]},
            "encoding": {"x": {"field": "x", "type": "quantitative"}},
        },
    ]
    rows: list[tuple[Cell, ...]] = [(i.name, i.middle, i.low, i.high) for i in found]
    spec = whole(layers, height=ROW * len(found))
    return Figure(name, title, spec, ("variant", "difference", "low", "high"), rows)


def whole(layers: list[Spec], height: int = HEIGHT) -> Spec:
    """A specification of these layers, as wide as its place in the page."""
    return {"$schema": SCHEMA, "width": "container", "height": height, "autosize": AUTOSIZE, "layer": layers}


def _rules(marks: list[Spec], scale: Spec | None = None) -> Spec:
    x: Spec = {"field": "x", "type": "quantitative"} | ({"scale": scale} if scale else {})
    return {
        "data": {"values": marks},
        "encoding": {"x": x},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 1.5}},
            {
                "mark": {"type": "text", "angle": 270, "align": "right", "baseline": "bottom", "dx": -4, "dy": -3},
                "encoding": {"text": {"field": "text"}, "y": {"value": 0}},
            },
        ],
    }
