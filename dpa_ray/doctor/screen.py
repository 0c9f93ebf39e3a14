"""How does a person see what was found? The checks, each stage's memory, and real samples with their targets in colour."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa_ray.doctor.findings import WORST_FIRST, Findings
from dpa_ray.doctor.memory import GIB
from dpa_ray.report.console import terminal

STYLES = {"ok": "green", "warn": "bold yellow", "fail": "bold red", "skipped": "dim"}
SPAN_STYLES = {"target": "bold green", "context": "", "image": "cyan"}


def show(findings: Findings, to: Console | None = None) -> None:
    """Print all; what does not fit is folded, never cut."""
    console = to or terminal()
    stages = list(findings.stages.values())
    for stage in stages:
        _samples(console, stage)
    _memory(console, stages)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", overflow="fold")
    table.add_column("")
    table.add_column("found", overflow="fold")
    for check in findings.checks:
        found = Text()
        for lines, style in ((check.failures, STYLES["fail"]), (check.warnings, "yellow"), (check.notes, "")):
            for line in lines:
                found.append(("\n" if found else "") + line, style=style)
        table.add_row(check.name, Text(check.status, style=STYLES[check.status]), found)
    console.print(table)
    console.print()
    numbers = {status: sum(check.status == status for check in findings.checks) for status in WORST_FIRST}
    style = next(STYLES[status] for status in WORST_FIRST if numbers[status])
    console.print(", ".join(f"{number} {status}" for status, number in numbers.items() if number), style=style)


def _samples(console: Console, stage: dict[str, Any]) -> None:
    """Real samples as the stage's model reads them."""
    samples = stage.get("samples", ())
    if not samples:
        return
    console.print(f"{stage['stage']}: what is trained on (green) in real samples", style="bold", soft_wrap=True)
    for sample in samples:
        text = Text("  ")
        text.append(f"{sample['place']}  ", style="dim")
        for part, kind in sample["spans"]:
            # without colours, a log say, brackets show the same
            shown = part.replace("\n", "\\n")
            text.append(
                f"[{shown}]" if kind == "target" and not console.color_system else shown, style=SPAN_STYLES[kind]
            )
        console.print(text, soft_wrap=True)
    console.print()


def _memory(console: Console, stages: list[dict[str, Any]]) -> None:
    """A row for each stage and way of sharding; the recipe's own is marked."""
    rows = [(stage["stage"], row) for stage in stages for row in stage.get("memory", ())]
    if not rows:
        return
    unit, size = ("GiB", GIB) if max(row["total_at_max_length_bytes"] for _, row in rows) >= GIB else ("MiB", 2**20)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(f"{unit} a device", no_wrap=True)
    for name in ("ZeRO ", "weights", "grads", "masters", "Adam", "activ.", "loss", "other", "sum", "at max"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, row in rows:
        parts = [row[f"{name}_bytes"] for name in ("weights", "gradients", "masters", "moments", "activations", "loss")]
        total = row["total_bytes"]
        other = max(0, total - sum(parts))
        numbers = [f"{n / size:.1f}" for n in (*parts, other, total, row["total_at_max_length_bytes"])]
        way = "none" if row["zero_stage"] is None else str(row["zero_stage"])
        style = "bold" if row["is_chosen"] else "dim"
        table.add_row(stage, f"{way}{'*' if row['is_chosen'] else ' '}", *numbers, style=style)
    console.print(table)
    told = (
        "  *: the recipe's. sum: the worst moment, with samples as long as the longest seen; at max: as max_length\n"
        "  other: buckets, what CUDA takes, gathered parameters, copies at the update, the whole model at ZeRO 3's start"
    )
    console.print(told, style="dim", soft_wrap=True)
    console.print()
