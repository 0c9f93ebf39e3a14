"""Which setting wins, by how much, and what did sharing save? From a sweep's sweep.json, whatever of it is there yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpa_ray.report.content import number
from dpa_ray.report.figures import Cell, Interval, heat_map, intervals, parallel_coordinates
from dpa_ray.report.page import Block, Drawing, Facts, Section, Table, render

TRIALS = ("trials-table", "the table of trials")
MAX_AXES = 8
"""Of the parallel coordinates: more are not told apart."""

MOST_DRAWN = 500
"""Trials in a figure; the table has all."""


def sweep_page(name: str, url: str, sweep: Mapping[str, Any]) -> str:
    """The report of a sweep. `sweep`: sweep.json."""
    trials = [trial for trial in _listed(sweep.get("trials")) if isinstance(trial, dict)]
    settings, scores = _keys(trials, "overrides"), _keys(trials, "metrics")
    goal = _goal(sweep, scores)
    scores = [goal, *(key for key in scores if key != goal)] if goal in scores else scores
    states = [str(trial.get("status", "unknown")) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no trials yet"
    sections = [
        Section("what", "What was tried", _what(url, sweep, trials, goal)),
        *_compared(sweep),
        Section("trials", "Trials", _trials(trials, settings, scores), "" if trials else "There are no trials yet."),
        _figures(trials, settings, scores),
        _savings(sweep),
    ]
    return render(f"Sweep {name}", f"{len(trials)} trials: {counts}.", sections)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _keys(trials: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in _mapping(trial.get(part))))


def _cell(value: Any) -> Cell:
    return (
        value if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)) else str(value)
    )


def _goal(sweep: Mapping[str, Any], scores: Sequence[str]) -> str | None:
    """What trials are judged by: as the sweep says, else the first accuracy, else the first score."""
    told = sweep.get("metric")
    if isinstance(told, str):
        return told
    return next((key for key in scores if key.endswith("accuracy")), scores[0] if scores else None)


def _is_max(sweep: Mapping[str, Any], goal: str) -> bool:
    return sweep["mode"] == "max" if sweep.get("mode") in ("min", "max") else goal.endswith("accuracy")


def _name(trial: Mapping[str, Any], place: int) -> str:
    return next(
        (str(trial[key]) for key in ("name", "trial", "id", "number", "run") if trial.get(key) is not None), str(place)
    )


def _what(url: str, sweep: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], goal: str | None) -> list[Block]:
    rows = [
        (key, str(sweep[key]))
        for key in ("status", "search", "recipe", "seed")
        if isinstance(sweep.get(key), str | int)
    ]
    if goal is not None:
        rows.append(("judged by", goal))
        found = [
            (value, i)
            for i, t in enumerate(trials)
            if (value := number(_mapping(t.get("metrics")).get(goal))) is not None
        ]
        if found:
            value, place = (max if _is_max(sweep, goal) else min)(found, key=lambda pair: pair[0])
            best = trials[place]
            told = ", ".join(f"{key} {setting}" for key, setting in _mapping(best.get("overrides")).items())
            rows.append(
                ("best trial", f"{_name(best, place)}: {goal} {value:.4g}, with {told or 'nothing overridden'}")
            )
    return [Facts([*rows, ("folder", url)])]


def _trials(trials: Sequence[Mapping[str, Any]], settings: Sequence[str], scores: Sequence[str]) -> list[Block]:
    if not trials:
        return []
    has_reason = any(_reason(trial) for trial in trials)
    columns = ("trial", "status", *settings, *scores, *(("reason",) if has_reason else ()))
    rows: list[tuple[Cell, ...]] = []
    for place, trial in enumerate(trials):
        overrides, metrics = _mapping(trial.get("overrides")), _mapping(trial.get("metrics"))
        row = [_name(trial, place), str(trial.get("status", "unknown"))]
        values = [*(_cell(overrides.get(key)) for key in settings), *(_cell(metrics.get(key)) for key in scores)]
        rows.append((*row, *values, *((_reason(trial),) if has_reason else ())))
    return [Table(TRIALS[0], "Trials; the buttons in the head sort by a column", columns, rows)]


def _reason(trial: Mapping[str, Any]) -> str:
    return next((str(trial[key]) for key in ("reason", "error") if trial.get(key)), "")


def _figures(trials: Sequence[Mapping[str, Any]], settings: Sequence[str], scores: Sequence[str]) -> Section:
    drawn = trials[:MOST_DRAWN]
    tried = {key: [number(_mapping(t.get("overrides")).get(key)) for t in drawn] for key in settings}
    found = {key: [number(_mapping(t.get("metrics")).get(key)) for t in drawn] for key in scores}
    numeric = [key for key, values in tried.items() if len({v for v in values if v is not None}) > 1]
    scored = [key for key, values in found.items() if any(v is not None for v in values)]
    blocks: list[Block] = []
    if len(numeric) >= 2 and scored:
        points = [[*(tried[key][i] for key in numeric), *(found[key][i] for key in scored)] for i in range(len(drawn))]
        blocks.append(
            Drawing(heat_map("heat-map", "A score over two settings", numeric, scored, points, data_at=TRIALS))
        )
    varied = [k for k in settings if len({str(_mapping(t.get("overrides")).get(k)) for t in drawn}) > 1][: MAX_AXES - 1]
    if varied and scored:
        axes = [*varied, scored[0]]
        lines = [
            (_name(t, i), [*(_cell(_mapping(t.get("overrides")).get(k)) for k in varied), found[scored[0]][i]])
            for i, t in enumerate(drawn)
        ]
        blocks.append(Drawing(parallel_coordinates("parallel", "Every trial as a line", axes, lines, data_at=TRIALS)))
    note = "" if blocks else "No trial has a score over settings that differ yet."
    if len(trials) > MOST_DRAWN:
        note = f"The first {MOST_DRAWN} of {len(trials)} trials."
    return Section("settings", "Settings and scores", blocks, note)


def _savings(sweep: Mapping[str, Any]) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (stage, *(_cell(counts.get(key)) for key in ("asked", "made", "reused")))
        for stage, counts in _mapping(sweep.get("stages")).items()
        if isinstance(counts, dict)
    ]
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Table("savings-table", "Stages by artifact", ("stage", "asked for", "made", "reused"), rows, False)
        )
    cost = _mapping(sweep.get("gpu_s"))
    spent, naive = number(cost.get("spent")), number(cost.get("naive"))
    if spent is not None and naive is not None:
        facts = [("spent, device seconds", f"{spent:,.0f}"), ("without sharing, device seconds", f"{naive:,.0f}")]
        if naive > 0:
            facts.append(("saved", f"{1 - spent / naive:.0%}"))
        blocks.append(Facts(facts))
    return Section("savings", "What sharing saved", blocks, "" if blocks else "Nothing was counted yet.")


def _compared(sweep: Mapping[str, Any]) -> list[Section]:
    """Methods side by side, with the paired differences to the first of them."""
    compare = _mapping(sweep.get("compare"))
    rows = [row for row in _listed(compare.get("methods")) if isinstance(row, dict)]
    if not rows:
        return []
    metric, baseline = (str(compare.get(key, text)) for key, text in (("metric", "score"), ("baseline", "vanilla")))
    cells: list[tuple[Cell, ...]] = []
    found = []
    for row in rows:
        name = str(row.get("method", "?"))
        ends = [number(end) for end in _listed(row.get("interval"))]
        low, high = ends if len(ends) == 2 else (None, None)
        difference = number(row.get("difference"))
        verdict = "–"
        if difference is not None and low is not None and high is not None:
            found.append(Interval(name, difference, low, high))
            verdict = (
                "no difference shown"
                if low <= 0 <= high
                else "better"
                if (difference > 0) == _is_max(compare, metric)
                else "worse"
            )
        cells.append(
            (
                name,
                _cell(row.get("num_seeds")),
                number(row.get("mean")),
                number(row.get("std")),
                difference,
                low,
                high,
                verdict,
            )
        )
    columns = ("method", "seeds", "mean", "standard deviation", f"difference to {baseline}", "low", "high", "verdict")
    blocks: list[Block] = [Table("compare-table", f"{metric} by method", columns, cells)]
    if found:
        note = "Means of the differences, seed by seed, with their confidence intervals. An interval across 0 shows no difference."
        title = f"{metric}: difference to {baseline}"
        blocks.append(Drawing(intervals("compare", title, found, x=f"difference in {metric}", note=note)))
    return [Section("compare", "Methods side by side", blocks)]
