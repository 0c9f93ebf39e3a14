"""What do the metrics of runs look like? Loss curves, p - q with its clamp, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpa_ray.report.content import TITLES, RunData, mapping, number
from dpa_ray.report.figures import Curve, Figure, curves, gain_histogram, thinned, time_spent
from dpa_ray.report.timeline_figure import KINDS

LOSSES = {
    "nll_mean": "all targets",
    "nll_mean_visual": "visual words",
    "nll_mean_style": "other words",
    "loss": "weighted loss",
}
HELD_OUT = {"eval_nll": "held out", "eval_visual_nll": "held out, visual"}
"""The same of held-out data, in the steps after which the stage was evaluated."""

MOST_POINTS = 300
"""Of a curve: more cannot be told apart, and weigh on the page."""

ALL_POINTS, LEAST_POINTS = 1500, 24
"""Of all curves of a figure together, and of one that is among many."""


def _curve(name: str, records: Sequence[Mapping[str, Any]], key: str, most: int, length: int = 0) -> Curve:
    return thinned(Curve(name, [(record["step"], number(record.get(key))) for record in records]), most, length)


def loss_figures(run: RunData, most: int = MOST_POINTS) -> list[Figure]:
    """One per stage: mean nll of all targets, of visual words and others where they are known, what is optimised, and the nll
    of held-out data; each curve of `most` points."""
    figures = []
    for stage in run.stages:
        records = run.of_stage(stage)
        weighting = run.weightings.get(stage)
        is_uniform = weighting is not None and weighting.kind == "uniform"
        lines = [
            _curve(name, records, key, most)
            for key, name in LOSSES.items()
            if any(number(r.get(key)) is not None for r in records) and not (key == "loss" and is_uniform)
        ]
        for key, name in HELD_OUT.items():
            if evaluated := [record for record in records if number(record.get(key)) is not None]:
                lines.append(_curve(name, evaluated, key, most))
        marks = [(float(step), f"resumed after {step}") for step in resumed_from(run, stage)]
        notes = ["Mean negative log-likelihood per target token, in nats."]
        if not is_uniform:
            notes.append("The weighted loss is what is optimised: sum of w · nll over sum of w.")
        if any(record.get("reused") for record in records):
            notes.append("This stage was reused from an earlier run.")
        if len(records) > most:
            notes.append(
                f"{len(records)} steps, shown as means of neighbours, with the highest and the lowest as they are."
            )
        figures.append(
            curves(f"loss-{stage}", TITLES[stage], lines, x="step", y="nll", marks=marks, note=" ".join(notes))
        )
    return figures


def resumed_from(run: RunData, stage: str) -> list[int]:
    """The steps after which a stage was taken up again."""
    steps = mapping(mapping(run.info.get("timings")).get(stage)).get("resumed_from")
    return [step for step in steps if isinstance(step, int)] if isinstance(steps, list) else []


def overlaid_losses(runs: Sequence[RunData]) -> list[Figure]:
    """One per stage that any of `runs` has: mean nll of all targets, a line a run, all at the same steps."""
    most = max(LEAST_POINTS, ALL_POINTS // len(runs))
    figures = []
    for stage, title in TITLES.items():
        found = [(run.name, run.of_stage(stage)) for run in runs if stage in run.stages]
        longest = max((len(records) for _, records in found), default=0)
        lines = [_curve(name, records, "nll_mean", most, longest) for name, records in found]
        if lines:
            note = "Mean negative log-likelihood per target token, in nats, of all targets whatever their weight."
            if longest > most:
                note += f" Means over {math.ceil(longest / most)} steps, with each run's highest and lowest step as they are."
            figures.append(curves(f"losses-{stage}", title, lines, x="step", y="nll", note=note))
    return figures


def gain_figures(run: RunData, edges: Sequence[float]) -> list[Figure]:
    """p - q of each stage that weighs by it, when it began and when it ended. `edges`: of the histogram's bins."""
    figures = []
    for stage in run.stages:
        found = [r for r in run.of_stage(stage) if _is_histogram(r.get("gain_histogram"), len(edges) - 1)]
        if not found:
            continue
        first, last = found[0], found[-1]
        counts = {f"step {record['step']}": record["gain_histogram"] for record in (first, last)}
        weighting = run.weightings.get(stage)
        bounds, note = None, "How much more likely the image makes each target: p with it, q without it."
        if weighting is not None and weighting.kind == "prob":
            bounds = (weighting.lower, weighting.upper)
            at = [number(last.get(f"weight_at_{end}_fraction")) for end in ("lower", "upper")]
            note += " Weights are p − q, clamped to the bounds that are drawn in."
            if None not in at:
                note += f" In step {last['step']}, {at[0]:.0%} of all targets are at the lower bound and {at[1]:.0%} at the upper."
        elif weighting is not None and weighting.kind == "logit":
            note += (
                f" The weights of this method are differences of logits, clamped to {weighting.lower:g} to "
                f"{weighting.upper:g}: a clamp that cannot be drawn on this axis."
            )
        figures.append(gain_histogram(f"gain-{stage}", TITLES[stage], edges, counts, bounds=bounds, note=note))
    return figures


def _is_histogram(value: Any, num_bins: int) -> bool:
    return isinstance(value, list) and len(value) == num_bins and all(isinstance(count, int | float) for count in value)


def time_figure(run: RunData) -> Figure | None:
    """Where the wall time went: by the ledger in run.json where there is one, else by what each stage measured."""
    goodput = run.info.get("goodput")
    if isinstance(goodput, dict) and isinstance(goodput.get("stages"), dict):
        rows = {**goodput["stages"], "outside of stages": goodput.get("outside_stages", {})}
        parts = {stage: _seconds(found) for stage, found in rows.items()}
        note = "All attempts together; parts of a stage are added up, not shown when they happened."
        if (share := number(goodput.get("goodput"))) is not None:
            note = f"Goodput {share:.1%}: the share of the wall time that was training. {note}"
    else:
        timings = mapping(run.info.get("timings")) or dict.fromkeys(run.stages)  # it failed before any were written
        parts = {stage: _measured(run, stage, mapping(timing)) for stage, timing in timings.items()}
        note = "What each stage measured of itself; parts are added up, not shown when they happened. "
        note += "A reused stage took no time of this run."
    if not any(sum(found.values()) > 0 for found in parts.values()):
        return None
    return time_spent("time", "Wall time by stage", parts, order=list(KINDS.values()), note=note)


def _seconds(found: Any) -> dict[str, float]:
    if not isinstance(found, dict):
        return {}
    names = {key: key.removesuffix("_s") for key in found if key.endswith("_s")}
    parts = {KINDS.get(name, name.replace("_", " ")): number(found[key]) for key, name in names.items()}
    return {kind: seconds for kind, seconds in parts.items() if seconds is not None and seconds > 0}


def _measured(run: RunData, stage: str, timing: Mapping[str, Any]) -> dict[str, float]:
    wall_s, records = number(timing.get("wall_time_s")) or 0.0, run.of_stage(stage)
    if timing.get("reused") or any(record.get("reused") for record in records):
        return {}
    data_s = sum(number(r.get("data_wait_s")) or 0.0 for r in records)
    training_s = sum(number(r.get("step_time_s")) or 0.0 for r in records) - data_s
    saving_s = number(timing.get("saving_s")) or 0.0
    known = {"training": training_s, "waiting for data": data_s, "saving": saving_s}
    return {**known, "other": max(0.0, wall_s - sum(known.values()))}
