"""How does a person see a plan? Assumptions, the run on each number of GPUs, and what a growing batch would ask for."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dpa_ray.doctor.plan.estimate import Plan, Whole
from dpa_ray.report.console import duration, plain_table, terminal

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def num_bytes(number: float) -> str:
    """Decimal units, as networks and stores are sold."""
    size, unit = next(((size, unit) for size, unit in UNITS if number >= size), (1.0, "B"))
    return f"{number / size:,.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"


def show(plan: Plan, to: Console | None = None) -> None:
    """Print all; what does not fit is folded, never cut."""
    console = to or terminal()
    console.print(
        f"{plan.recipe}: with the recipe's batches, at every number of GPUs the same result",
        style="bold",
        soft_wrap=True,
    )
    table = plain_table("part", ">GPUs", ">steps", ">s a step", ">time", ">GPU hours", ">read", ">written")
    for whole in plan.wholes:
        for row in whole.to_dict()["parts"]:
            timed = row["time_s"] > 0
            table.add_row(
                row["part"], f"{whole.num_gpus:,}", f"{row['num_steps']:,}" if row["num_steps"] else "",
                f"{row['step_time_s']:.3g}" if row["num_steps"] else "", duration(row["time_s"]) if timed else "",
                f"{row['gpu_hours']:,.1f}" if timed else "", num_bytes(sum(row["read"].values())),
                num_bytes(sum(row["written"].values())),
            )  # fmt: skip
        _total(whole, table)
    console.print(table)
    console.print()
    console.print("with as many samples on each GPU as in the recipe: the batch grows", style="bold", soft_wrap=True)
    scaling = plain_table(
        "stage", ">GPUs", ">batch", ">s a step", ">samples/s", ">reads", ">data", ">checkpoints", ">store", ">start",
        "nearest limit",
    )  # fmt: skip
    for one in plan.scaled:
        nearest = max(one.limits, key=lambda limit: limit.share)
        scaling.add_row(
            one.stage, f"{one.num_gpus:,}", f"{one.batch:,}", f"{one.step_time_s:.3g}", f"{one.samples_per_s:,.0f}",
            f"{one.reads_of_a_byte:.1f}", f"{num_bytes(one.data_bytes_per_s)}/s", f"{num_bytes(one.checkpoint_bytes_per_s)}/s",
            f"{one.store_share:.0%}", num_bytes(one.start_bytes), f"{nearest.who} {nearest.share:.0%}",
            style="bold yellow" if max(one.store_share, nearest.share) >= 1 else "",
        )  # fmt: skip
    console.print(scaling)
    console.print(
        "  reads: of each byte of the shards. store: share of what it gives. start: every node fetches the models at once",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    console.print()
    _limits(plan, console)
    console.print("assumptions", style="bold")
    for text in plan.assumptions:
        console.print(f"  {text}", soft_wrap=True)


def _total(whole: Whole, table: Table) -> None:
    total = whole.to_dict()["total"]
    table.add_row(
        "together", f"{whole.num_gpus:,}", "", "", duration(total["time_s"]), f"{total['gpu_hours']:,.1f}",
        num_bytes(total["read_bytes"]), num_bytes(total["written_bytes"]), style="bold",
    )  # fmt: skip


def _limits(plan: Plan, console: Console) -> None:
    """Of each process that does not grow, the fewest workers of any stage with which it is the limit."""
    first: dict[str, tuple[int, str]] = {}
    for one in plan.scaled:
        for limit in one.limits:
            what = f"{limit.who}: {limit.what}"
            if limit.at_workers is not None and limit.at_workers < first.get(what, (1 << 62, ""))[0]:
                first[what] = (limit.at_workers, one.stage)
    console.print("what does not grow with the cluster becomes the limit at", style="bold")
    for what, (workers, stage) in sorted(first.items(), key=lambda item: item[1]):
        console.print(f"  {workers:>10,} workers  {what} ({stage})", soft_wrap=True)
    console.print()
