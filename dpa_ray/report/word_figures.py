"""Which words did a stage learn, and which did it unlearn, and is that the image's doing? Losses by word, before and after.

Visual words are those that the image is known to show, where the data knows any; else those that the image makes likelier
by more than VISUAL_GAIN, on average over the runs that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dpa_ray.report.content import STAGES, TITLES, RunData, WordLosses, number
from dpa_ray.report.figures import TICKS, Cell, Figure, Spec, whole
from dpa_ray.report.page import Block, Drawing, Section, Table

VISUAL_GAIN = 0.05
"""The paper's lower bound of a weight (arXiv 2509.14735), whatever the recipe's bounds: methods are split alike."""

NUM_WORDS = 10
"""Either way, of those that changed most."""

LEAST_COUNT = 3
"""How often a word has to be in the samples to be among them; where hardly any are, once is enough."""

MOST_LISTED = 200
MOST_SERIES = 8
"""Runs side by side under their own names, as many as there are colours; more are shown as means by method."""

GROUPS = ("visual", "other")
DUMBBELL = "From the loss before to the dot, the loss after."
OTHER_DATA = "Not all of the same data, so that a difference may be that of the samples."
ROW, GROUP_ROW = 22, 30
"""Pixels."""


@dataclass(frozen=True)
class Word:
    """A word in one run, or on average over several."""

    count: float
    before: float  # nll in nats
    after: float
    gain: float  # p - q
    visual: float  # share of those known to be visual

    @property
    def change(self) -> float:
        return self.after - self.before


Words = Mapping[str, Word]


def word_section(runs: Sequence[tuple[str, RunData]], notes: Sequence[str] = ()) -> Section:
    """Before and after of one series, or the changes of several side by side.

    Args:
        runs: (name of the series, run): runs of one series are shown as their mean.
    """
    blocks: list[Block] = []
    for stage in STAGES:
        found: dict[str, list[Words]] = {}
        sources: set[str] = set()
        digests: set[str] = set()
        for name, run in runs:
            if (told := run.words.get(stage)) is not None and (words := _words(told)):
                found.setdefault(name, []).append(words)
                sources.add(f"{told.num_samples} {told.samples} samples")
                digests.add(told.digest)
        series = {name: _mean(each) for name, each in found.items()}
        series = {name: words for name, words in series.items() if words}
        if series:
            source = f"Of {' and '.join(sorted(sources))}."
            blocks += _blocks(stage, series, f"{source} {OTHER_DATA}" if len(digests) > 1 else source)
    if not blocks:
        return Section(
            "word-losses", "Words learnt and unlearnt", [], "No stage of these runs left the losses of words."
        )
    note = (
        "The nll of a word is the sum over its tokens, in nats, on average over the "
        "places where it stands; before the stage's first step, and after its last."
    )
    return Section("word-losses", "Words learnt and unlearnt", blocks, " ".join([note, *notes]))


def by_name_or_method(runs: Sequence[RunData]) -> tuple[list[tuple[str, RunData]], list[str]]:
    """Arguments of `word_section`: each run on its own, or where these are too many to be told apart, by method."""
    if len(runs) <= MOST_SERIES:
        return [(run.name, run) for run in runs], []
    series = [(str(run.info.get("method", "unknown")), run) for run in runs]
    return series, ["By method, each the mean of its runs, over the words that all of them have."]


def _words(told: WordLosses) -> dict[str, Word]:
    """Those whose numbers are finite."""
    found = {}
    for row in told.rows:
        numbers = [number(row.get(key)) for key in ("count", "nll_before", "nll_after", "gain", "visual")]
        if None not in numbers:
            found[str(row.get("word"))] = Word(*numbers)  # type: ignore[arg-type]
    return found


def _mean(each: Sequence[Words]) -> dict[str, Word]:
    """Of the words that all have."""
    common = [word for word in each[0] if all(word in words for words in each)]
    return {
        word: Word(*(fmean(getattr(words[word], key) for words in each) for key in Word.__dataclass_fields__))
        for word in common
    }


def _visual(series: Sequence[Words]) -> set[str]:
    """The visual words."""
    every = {word for words in series for word in words}
    of = {word: [words[word] for words in series if word in words] for word in every}
    if any(found.visual > 0 for each in of.values() for found in each):
        return {word for word, each in of.items() if fmean(found.visual for found in each) >= 0.5}
    return {word for word, each in of.items() if fmean(found.gain for found in each) > VISUAL_GAIN}


def _blocks(stage: str, series: Mapping[str, Words], source: str) -> list[Block]:
    visual = _visual(list(series.values()))
    is_known = any(found.visual > 0 for words in series.values() for found in words.values())
    split = "known to be shown by the image" if is_known else f"with p − q above {VISUAL_GAIN:g} on average"
    blocks: list[Block] = [
        Drawing(_groups(stage, series, visual, f"{source} {DUMBBELL} Visual words are those {split}."))
    ]
    if len(series) == 1:
        (words,) = series.values()
        blocks += [Drawing(_before_and_after(stage, words, visual)), _list(stage, words, visual)]
    else:
        blocks.append(Drawing(_changes(stage, series, visual)))
    return blocks


def _group(word: str, visual: set[str]) -> str:
    return GROUPS[0] if word in visual else GROUPS[1]


def _groups(stage: str, series: Mapping[str, Words], visual: set[str], note: str) -> Figure:
    """Visual and other words as a whole: mean nll, every word as often as it stands there."""
    rows: list[tuple[Cell, ...]] = []
    values = []
    for group in GROUPS:
        for name, words in series.items():
            found = [w for word, w in words.items() if _group(word, visual) == group]
            if not found:
                continue
            total = sum(w.count for w in found)
            before, after = (sum(w.count * getattr(w, key) for w in found) / total for key in ("before", "after"))
            label = f"{group} words" if len(series) == 1 else f"{group}, {name}"
            values.append({"row": label, "group": group, "before": _short(before), "after": _short(after)})
            rows.append((label, len(found), _short(total), _short(before), _short(after), _short(after - before)))
    columns = ("group", "words", "in the samples", "nll before", "nll after", "change")
    title = f"{TITLES[stage]}: visual words and others"
    spec = _dumbbells(values, [str(row[0]) for row in rows], GROUP_ROW)
    return Figure(f"word-groups-{stage}", title, spec, columns, rows, note)


def _before_and_after(stage: str, words: Words, visual: set[str]) -> Figure:
    often = _often(words)
    order = sorted(often, key=lambda word: words[word].change)
    shown = list(dict.fromkeys([*order[:NUM_WORDS], *order[-NUM_WORDS:]]))
    values = [
        {"row": word, "group": _group(word, visual), "before": _short(words[word].before), "after": _short(words[word].after)}
        for word in shown
    ]  # fmt: skip
    rows = [_row(word, words[word], visual) for word in shown]
    note = f"{DUMBBELL} What fell most at the top, what fell least or rose at the bottom."
    title = f"{TITLES[stage]}: the words that changed most, and least"
    return Figure(f"words-{stage}", title, _dumbbells(values, shown, ROW), COLUMNS, rows, note)


COLUMNS = ("word", "group", "in the samples", "nll before", "nll after", "change", "p − q after")


def _row(word: str, found: Word, visual: set[str]) -> tuple[Cell, ...]:
    numbers = (found.count, found.before, found.after, found.change, found.gain)
    return (word, _group(word, visual), *(_short(value) for value in numbers))


def _list(stage: str, words: Words, visual: set[str]) -> Table:
    most = sorted(words, key=lambda word: -words[word].count)[:MOST_LISTED]
    caption = f"{TITLES[stage]}: all words"
    if len(words) > len(most):
        caption = f"{TITLES[stage]}: the {MOST_LISTED} most frequent of {len(words):,} words"
    return Table(
        f"word-table-{stage}", caption, COLUMNS, [_row(word, words[word], visual) for word in most], is_folded=True
    )


def _often(words: Words) -> list[str]:
    often = [word for word, found in words.items() if found.count >= LEAST_COUNT]
    return often if len(often) >= NUM_WORDS else list(words)


def _changes(stage: str, series: Mapping[str, Words], visual: set[str]) -> Figure:
    """Change of nll by word and series; words by how much the others' change differs from the first one's."""
    baseline, *others = _baseline_first(series)
    common = [w for w in _often(series[baseline]) if all(w in series[name] for name in others)]

    def ahead(word: str) -> float:
        difference = fmean(series[name][word].change for name in others) - series[baseline][word].change
        return round(difference, 6)  # words that do not differ keep their order

    order = sorted(common, key=ahead)
    shown = list(dict.fromkeys([*order[:NUM_WORDS], *order[-NUM_WORDS:]]))
    labels = {word: f"{word} •" if word in visual else word for word in shown}
    names = [baseline, *others]
    values = [
        {"row": labels[word], "series": name, "x": _short(series[name][word].change)}
        for word in shown
        for name in names
    ]
    rows: list[tuple[Cell, ...]] = []
    for word in shown:
        both = (getattr(series[name][word], key) for name in names for key in ("before", "after"))
        rows.append((word, _group(word, visual), *map(_short, both)))
    heads = (f"{name}: nll {when}" for name in names for when in ("before", "after"))
    y = _rows_axis([labels[word] for word in shown])
    told = {"field": "series", "type": "nominal", "scale": {"domain": names}, "title": None}
    layers: list[Spec] = [
        {
            "data": {"values": [{"x": 0}]},
            "mark": {"type": "rule", "strokeDash": [4, 4]},
            "encoding": {"x": {"field": "x", "type": "quantitative"}},
        },
        {
            "data": {"values": values},
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.9, "tooltip": True},
            "encoding": {
                "y": y,
                "x": {"field": "x", "type": "quantitative", "title": "change of nll (left: learnt)", "axis": TICKS},
                "color": told,
                "shape": told,
            },
        },
    ]
    note = (
        f"At the top the words that the others learn more of than {baseline}, at the bottom those they learn less of. "
        "Visual words have a •."
    )
    title = f"{TITLES[stage]}: change of nll by word"
    spec = whole(layers, ROW * max(3, len(shown)))
    return Figure(f"words-{stage}", title, spec, ("word", "group", *heads), rows, note)


def _baseline_first(series: Mapping[str, Any]) -> list[str]:
    return sorted(series, key=lambda name: name != "vanilla")


def _dumbbells(values: list[Spec], order: Sequence[str], height: int) -> Spec:
    """A row each from `before` to `after`, coloured by group."""
    colour = {
        "field": "group",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(GROUPS)},
    }
    y = _rows_axis(order)
    x = {"type": "quantitative", "title": "nll of the word, in nats", "axis": TICKS}
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"y": y, "x": {"field": "before", **x}, "x2": {"field": "after"}, "color": colour},
        },
        {
            "data": {"values": values},
            "mark": {"type": "tick", "thickness": 2, "size": 10, "opacity": 1},
            "encoding": {"y": y, "x": {"field": "before", **x}, "color": colour},
        },
        {
            "data": {"values": values},
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "tooltip": True},
            "encoding": {"y": y, "x": {"field": "after", **x}, "color": colour},
        },
    ]  # fmt: skip
    return whole(layers, height * max(2, len(order)))


def _rows_axis(order: Sequence[str]) -> Spec:
    return {
        "field": "row",
        "type": "nominal",
        "scale": {"domain": list(order)},
        "title": None,
        "axis": {"labelLimit": 150, "grid": True},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
