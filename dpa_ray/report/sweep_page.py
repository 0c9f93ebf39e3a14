"""Which setting wins, by how much, and what did sharing save? From a sweep's sweep.json, whatever of it is there yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpa_ray.report.content import RunData, WordLosses, mapping, number
from dpa_ray.report.figures import Cell, Figure, Interval, heat_map, intervals, parallel_coordinates
from dpa_ray.report.page import Block, Drawing, Facts, Section, Table, render
from dpa_ray.report.word_figures import word_section

TRIALS = ("trials-table", "the table of trials")
MAX_AXES = 8
"""Of the parallel coordinates: more are not told apart."""

MOST_DRAWN, MOST_LISTED = 500, 2500
"""Trials in a figure, and in the table."""

MOST_SCORES = 20_000
"""In the table: beyond them, of a trial only what it is judged by and what came of held-out questions is shown."""

MAX_REASON = 300
"""Characters of why a trial ended; sweep.json has all."""


@dataclass(frozen=True)
class Trial:
    """One trial; what sweep.json does not say of it is empty."""

    name: str
    status: str
    overrides: Mapping[str, Any]
    metrics: Mapping[str, Any]
    reason: str
    variant: str | None
    wall_time_s: float | None

    @classmethod
    def of(cls, values: Mapping[str, Any], place: int) -> Trial:
        variant = values.get("variant")
        return cls(
            str(values.get("name", place)), str(values.get("status", "unknown")), mapping(values.get("overrides")),
            mapping(values.get("metrics")), str(values.get("reason") or ""), None if variant is None else str(variant),
            number(values.get("wall_time_s")),
        )  # fmt: skip

    def setting(self, key: str) -> Cell:
        return _cell(self.overrides.get(key))


def sweep_page(
    name: str, url: str, sweep: Mapping[str, Any], words: Mapping[str, Mapping[str, WordLosses]] | None = None
) -> str:
    """The report of a sweep. `sweep`: sweep.json; `words`: losses of words by trial and stage."""
    found = sweep.get("trials")
    listed = [values for values in found if isinstance(values, dict)] if isinstance(found, list) else []
    trials = [Trial.of(values, place) for place, values in enumerate(listed)]
    settings = list(dict.fromkeys(key for trial in trials for key in trial.overrides))
    scores = list(dict.fromkeys(key for trial in trials for key in trial.metrics))
    goal = sweep.get("metric")
    if isinstance(goal, str) and goal in scores:  # what trials are judged by comes first
        scores = [goal, *(key for key in scores if key != goal)]
    shown = _shown(scores, goal, min(len(trials), MOST_LISTED))
    states = [trial.status for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
    sections = [
        Section("what", "What was tried", [_facts(sweep, trials, url)]),
        *_compared(mapping(sweep.get("compare"))),
        _table(trials, settings, shown, len(scores)),
        _figures(trials, settings, shown),
        _words(trials, words or {}, sweep.get("best")),
        _savings(sweep),
    ]
    return render(f"Sweep {name}", f"{len(trials)} trials: {counts}.", sections)


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str) or number(value) is not None else str(value)


def _facts(sweep: Mapping[str, Any], trials: Sequence[Trial], url: str) -> Facts:
    names = {
        "status": "status",
        "search": "search",
        "metric": "judged by",
        "mode": "the better is the",
        "error": "error",
    }
    words = {"max": "larger", "min": "smaller"}
    rows = [(text, words.get(str(sweep[key]), str(sweep[key]))) for key, text in names.items() if sweep.get(key)]
    best = next((trial for trial in trials if trial.name == sweep.get("best")), None)
    if best is not None:
        told = ", ".join(f"{key} {value}" for key, value in best.overrides.items()) or "nothing overridden"
        score = number(best.metrics.get(str(sweep.get("metric"))))
        rows.append(("best trial", f"{best.name}, {told}" + ("" if score is None else f": {score:.4g}")))
    left_out = sweep.get("left_out")
    if isinstance(left_out, list) and left_out:
        rows.append(("left out, as lower > upper", str(len(left_out))))
    if (wall_s := number(sweep.get("wall_time_s"))) is not None:
        rows.append(("wall time of all attempts", f"{wall_s:,.0f} s"))
    return Facts([*rows, ("folder", url)])


def _shown(scores: list[str], goal: Any, num_trials: int) -> list[str]:
    """Of the scores, those that a page of so many trials has room for."""
    if num_trials * len(scores) <= MOST_SCORES:
        return scores
    few = [key for key in scores if key == goal or key.startswith("eval.")] or scores
    return few[: max(1, MOST_SCORES // num_trials)]


def _table(every: Sequence[Trial], settings: Sequence[str], scores: Sequence[str], num_scores: int) -> Section:
    if not every:
        return Section("trials", "Trials", [], "There are no trials yet.")
    trials, notes = every[:MOST_LISTED], []
    if len(every) > len(trials):
        notes.append(f"The first {len(trials):,} of {len(every):,} trials; sweep.json has all.")
    if num_scores > len(scores):
        notes.append(f"{len(scores)} of {num_scores} metrics; sweep.json has all.")
    columns: dict[str, list[Cell]] = {"trial": [t.name for t in trials], "status": [t.status for t in trials]}
    if any(trial.variant for trial in trials):
        columns["variant"] = [trial.variant for trial in trials]
    columns |= {key: [trial.setting(key) for trial in trials] for key in settings}
    columns |= {key: [_cell(trial.metrics.get(key)) for trial in trials] for key in scores}
    if any(trial.wall_time_s is not None for trial in trials):
        columns["wall time, s"] = [trial.wall_time_s for trial in trials]
    if any(trial.reason for trial in trials):
        columns["reason"] = [_shortened(trial.reason) for trial in trials]
    rows = list(zip(*columns.values(), strict=True))
    table = Table(TRIALS[0], "Trials; the buttons in the head sort by a column", tuple(columns), rows)
    return Section("trials", "Trials", [table], " ".join(notes))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"


def _figures(trials: Sequence[Trial], settings: Sequence[str], scores: Sequence[str]) -> Section:
    """Of trials that came to their end: the scores of others are not those of the same step."""
    done = [trial for trial in trials[:MOST_LISTED] if trial.status == "done"]
    drawn = done[:MOST_DRAWN]
    varied = [key for key in settings if len({str(trial.setting(key)) for trial in drawn}) > 1]
    numeric = [key for key in varied if all(number(trial.setting(key)) is not None for trial in drawn)]
    scored = [key for key in scores if any(number(trial.metrics.get(key)) is not None for trial in drawn)]
    blocks: list[Block] = []
    if len(numeric) >= 2 and scored:
        points = [
            [*(number(trial.setting(key)) for key in numeric), *(number(trial.metrics.get(key)) for key in scored)]
            for trial in drawn
        ]
        figure = heat_map("heat-map", "A score over two settings", numeric, scored, points, data_at=TRIALS)
        blocks.append(Drawing(figure))
    if varied and scored:
        axes = varied[: MAX_AXES - 1]
        lines = [
            (trial.name, [*(trial.setting(key) for key in axes), number(trial.metrics.get(scored[0]))])
            for trial in drawn
        ]
        title = "Every trial as a line"
        blocks.append(Drawing(parallel_coordinates("parallel", title, [*axes, scored[0]], lines, data_at=TRIALS)))
    note = "" if blocks else "No two finished trials differ in their settings yet."
    if len(done) > MOST_DRAWN:
        note = f"The first {MOST_DRAWN} of {len(done)} finished trials."
    return Section("settings", "Settings and scores", blocks, note)


def _words(trials: Sequence[Trial], words: Mapping[str, Mapping[str, WordLosses]], best: Any) -> Section:
    """Variants or methods side by side, each as the mean of its trials; where there is only one, the best trial."""
    done = [trial for trial in trials if trial.name in words]
    runs = {trial.name: RunData(trial.name, "", {}, words=words[trial.name]) for trial in done}
    num_done = sum(trial.status == "done" for trial in trials)
    some = [f"Of {len(done)} of the {num_done} trials that are done."] if 0 < len(done) < num_done else []
    series = [(trial.variant or str(trial.overrides.get("method", "")), runs[trial.name]) for trial in done]
    if len({name for name, _ in series}) > 1:
        return word_section(series, ["Each the mean of its trials, over the words that all of them have.", *some])
    alone = [trial for trial in done if trial.name == best] or done[:1]
    return word_section([(t.name, runs[t.name]) for t in alone], [f"Of the trial {t.name}." for t in alone])


def _savings(sweep: Mapping[str, Any]) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (stage, *(_cell(counts.get(key)) for key in ("asked", "made", "reused")))
        for stage, counts in mapping(sweep.get("stages")).items()
        if isinstance(counts, dict)
    ]
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Table("savings-table", "Stages by artifact", ("stage", "asked for", "made", "reused"), rows, False)
        )
    cost = mapping(sweep.get("gpu_s"))
    spent, naive = number(cost.get("spent")), number(cost.get("naive"))
    if spent is not None and naive is not None:
        unit = "GPU" if sweep.get("device") == "gpu" else "worker"
        facts = [(f"spent, {unit} seconds", f"{spent:,.0f}"), (f"without sharing, {unit} seconds", f"{naive:,.0f}")]
        if naive > 0:
            facts.append(("saved", f"{1 - spent / naive:.0%}"))
        blocks.append(Facts(facts))
    return Section("savings", "What sharing saved", blocks, "" if blocks else "Nothing was counted yet.")


def _compared(compare: Mapping[str, Any]) -> list[Section]:
    """Variants side by side over the same seeds, with the paired differences to the baseline, by metric."""
    blocks: list[Block] = []
    for place, (metric, found) in enumerate(mapping(compare.get("metrics")).items()):
        rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        if rows:
            blocks += _compared_by(metric, rows, str(compare.get("baseline", "the baseline")), place)
    if not blocks:
        return []
    level = number(compare.get("level"))
    note = "Differences are means over the seeds that both have, pair by pair"
    note += f", with intervals of {level:.0%} confidence" if level is not None else ""
    return [Section("compare", "Methods side by side", blocks, f"{note}. An interval across 0 shows no difference.")]


def _compared_by(metric: str, rows: Sequence[Mapping[str, Any]], baseline: str, place: int) -> list[Block]:
    cells: list[tuple[Cell, ...]] = []
    drawn: list[Interval] = []
    for row in rows:
        name, difference = str(row.get("variant", "?")), mapping(row.get("difference"))
        mean, low, high = (number(difference.get(key)) for key in ("mean", "low", "high"))
        if mean is not None and low is not None and high is not None:
            drawn.append(Interval(name, mean, low, high))
        counts = (_cell(row.get("num_seeds")), _cell(row.get("num_failed")))
        verdict = str(difference.get("verdict", "–"))
        cells.append((name, *counts, number(row.get("mean")), number(row.get("std")), mean, low, high, verdict))
    columns = ("variant", "seeds", "failed", "mean", "standard deviation", f"difference to {baseline}", "low", "high")
    table = Table(f"compare-table-{place}", f"{metric} by variant", (*columns, "verdict"), cells)
    if not drawn:
        return [table]
    figure: Figure = intervals(
        f"compare-{place}", f"{metric}: difference to {baseline}", drawn, x=f"difference in {metric}"
    )
    return [table, Drawing(figure)]
