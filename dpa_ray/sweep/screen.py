"""What does a person see of a sweep? A line per trial as it comes, and at the end what won, by how much, at what cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from dpa_ray.report.console import duration, plain_table, terminal
from dpa_ray.sweep.space import describe


def header(values: Mapping[str, Any], where: str, to: Console | None = None) -> None:
    """What is searched, how, and where it is written down."""
    console = to or terminal()
    console.print(f"dpa_ray sweep: {values['name']}", style="bold", soft_wrap=True)
    console.print(f"  search  {values['search']}, by {values['metric']} ({values['mode']})", soft_wrap=True)
    console.print(f"  record  {where}", soft_wrap=True)
    if values["left_out"]:
        console.print(
            f"  left out, as cmo.lower > cmo.upper: {len(values['left_out'])} of the combinations, the first "
            f"{describe(values['left_out'][0])}",
            soft_wrap=True,
        )
    console.print()


def closing(values: Mapping[str, Any], where: str, to: Console | None = None) -> None:
    """Trials, stages made and reused, and the cost beside that of each trial alone."""
    console = to or terminal()
    metric = values["metric"]
    console.print()
    if "compare" in values:
        _comparison(values["compare"], console)
    else:
        _trials(values, metric, console)
    console.print()
    _stages(values, console)
    trials = values["trials"]
    counts = {status: sum(trial["status"] == status for trial in trials) for status in
              ("done", "stopped", "failed", "interrupted", "waiting")}  # fmt: skip
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count), soft_wrap=True)
    for trial in trials:
        if trial["status"] == "failed":
            console.print(f"  {trial['name']} failed: {trial['reason']}", soft_wrap=True)
    judged = [trial for trial in trials if metric in trial["metrics"]]
    if not judged and counts["done"]:
        known = sorted({name for trial in trials for name in trial["metrics"]})
        console.print(f"no trial told {metric}; told were {', '.join(known)}", soft_wrap=True)
    if values["best"] and "compare" not in values:
        console.print(f"best: {values['best']}", soft_wrap=True)
    console.print(f"  record  {where}", soft_wrap=True)


def _trials(values: Mapping[str, Any], metric: str, console: Console) -> None:
    keys = list(dict.fromkeys(key for trial in values["trials"] for key in trial["overrides"]))
    rows = plain_table("trial", *keys, f">{metric}", ">time", "")
    sign = 1 if values["mode"] == "min" else -1
    order = sorted(
        values["trials"],
        key=lambda trial: (metric not in trial["metrics"], sign * trial["metrics"].get(metric, 0.0)),
    )
    for trial in order:
        value = trial["metrics"].get(metric)
        rows.add_row(
            trial["name"].removeprefix(values["name"] + "-"),
            *(_shown(trial["overrides"].get(key)) for key in keys),
            "-" if value is None else f"{value:.4f}",
            duration(trial["wall_time_s"]),
            trial["status"],
        )
    console.print(rows)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _stages(values: Mapping[str, Any], console: Console) -> None:
    rows = plain_table("stage", ">asked", ">made", ">reused")
    for stage, count in values["stages"].items():
        rows.add_row(stage, *(str(count[key]) for key in ("asked", "made", "reused")))
    console.print(rows)
    spent, naive = values["gpu_s"]["spent"], values["gpu_s"]["naive"]
    unit = "GPU seconds" if values["device"] == "gpu" else "worker seconds"
    saved = f", {100 * (1 - spent / naive):.0f} % saved" if naive else ""
    console.print(
        f"{unit} in stages: {spent:,.0f} spent, {naive:,.0f} if each trial had made its own{saved}", soft_wrap=True
    )


def _comparison(compare: Mapping[str, Any], console: Console) -> None:
    for metric, rows in compare["metrics"].items():
        shown = plain_table(
            "variant", ">seeds", f">{metric}", ">std", f">minus {compare['baseline']}", ">95 % interval", ""
        )
        for row in rows:
            found = row["difference"]
            failed = f" ({row['num_failed']} failed)" if row["num_failed"] else ""
            shown.add_row(
                row["variant"],
                f"{row['num_seeds']}{failed}",
                _number(row["mean"]),
                _number(row["std"]),
                "" if found is None else f"{found['mean']:+.4f}",
                "" if found is None or found["low"] is None else f"[{found['low']:+.4f}, {found['high']:+.4f}]",
                "" if found is None else found["verdict"],
            )
        console.print(shown)
        console.print()
    console.print("differences: paired by seed, Student's t; intervals are not corrected for their number")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
