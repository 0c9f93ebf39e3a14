"""How long is a sweep of ranks and bounds beside the same trials one by one, each alone, and is anything made twice?

Nine trials of a recipe of method dpa: three ranks of the proxy's LoRA by three upper bounds. Once as `jobs/sweep.py`, all
of which (and of Ray) is killed by SIGKILL when half of its trials are done, after which the same command is given again; and
once as nine commands `jobs/run_dpa.py`, one after the other, each with an empty store. The sweep's time is that of both of its
halves. What was finished when it was killed must be there afterwards, untouched; counts are those of sweep.json.

    python -m tests.benchmarks.sweep_sharing --out FILE
    python -m tests.benchmarks.sweep_sharing stages.instruct.max_steps=100
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.integration.runs import Running, start_dpa

RANKS = (8, 16, 32)
UPPERS = (0.3, 0.5, 1.0)
TIMEOUT_S = 7200.0


def start_sweep(recipe: Path, folder: Path, overrides: list[str]) -> Running:
    """`jobs/sweep.py` with the space of this file."""
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump({"stages.proxy_llm.lora.rank": list(RANKS), "cmo.upper": list(UPPERS)}))
    arguments = ("--space", str(space), *overrides)
    return start_dpa(recipe, folder / "store", "sweep", *arguments, job="sweep.py", folder=folder)


def record(folder: Path) -> dict[str, Any]:
    """sweep.json; empty before it is there."""
    file = folder / "store" / "sweeps" / "sweep" / "sweep.json"
    values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return values


def num_done(folder: Path) -> int:
    return sum(trial["status"] == "done" for trial in record(folder).get("trials", []))


def manifests(folder: Path) -> dict[str, str]:
    """Every artifact's manifest, which says when and by which run it was made."""
    return {path.parent.name: path.read_text() for path in (folder / "store/artifacts").glob("*/manifest.json")}


def shared(recipe: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The sweep, killed once. Raises: SystemExit where it fails, or makes again what was finished."""
    start = time.perf_counter()
    running = start_sweep(recipe, folder, overrides)
    while num_done(folder) < len(RANKS) * len(UPPERS) // 2:
        if running.process.poll() is not None:
            raise SystemExit(running.finished(1).output)
        time.sleep(0.2)
    before = manifests(folder)
    running.kill_all()
    killed_s = time.perf_counter() - start
    print(f"killed after {killed_s:.0f} s, {num_done(folder)} trials done", file=sys.stderr, flush=True)
    run = start_sweep(recipe, folder, overrides).finished(TIMEOUT_S)
    if run.returncode != 0:
        raise SystemExit(run.output)
    total_s, after = time.perf_counter() - start, manifests(folder)
    if again := [name for name, text in before.items() if after.get(name) != text]:
        raise SystemExit(f"made again after the kill, or gone: {', '.join(again)}")
    values = record(folder)
    return {
        "total_s": total_s, "killed_s": killed_s, "finished_before": len(before), "stages": values["stages"],
        "gpu_s": values["gpu_s"], "statuses": [trial["status"] for trial in values["trials"]],
    }  # fmt: skip


def alone(recipe: Path, folder: Path, overrides: list[str]) -> list[float]:
    """Seconds of each of the nine commands, with nothing to reuse."""
    times = []
    for number, (rank, upper) in enumerate(itertools.product(RANKS, UPPERS)):
        changes = [*overrides, f"stages.proxy_llm.lora.rank={rank}", f"cmo.upper={upper}"]
        start = time.perf_counter()
        run = start_dpa(recipe, folder / f"{number}/store", "alone", *changes, folder=folder / str(number)).finished(
            TIMEOUT_S
        )
        if run.returncode != 0:
            raise SystemExit(run.output)
        times.append(time.perf_counter() - start)
        print(f"alone, rank {rank}, upper bound {upper}: {times[-1]:.0f} s", file=sys.stderr, flush=True)
    return times


def table(swept: dict[str, Any], times: list[float]) -> str:
    """Counts of what was made, and both times with their ratio."""
    lines = [f"{'stage':14}{'asked':>8}{'made':>8}{'reused':>8}"]
    for stage, count in swept["stages"].items():
        lines.append(f"{stage:14}{count['asked']:8}{count['made']:8}{count['reused']:8}")
    lines.append(
        f"sweep {swept['total_s']:.0f} s (killed after {swept['killed_s']:.0f}), one by one {sum(times):.0f} s,"
    )
    lines.append(
        f"ratio {swept['total_s'] / sum(times):.2f}; workers' seconds spent / of the same trials without sharing "
        f"{swept['gpu_s']['spent'] / swept['gpu_s']['naive']:.2f}"
    )
    lines.append(f"{swept['finished_before']} artifacts finished when it was killed: none made again")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key.path=value, for the sweep and the single runs")
    parser.add_argument("--recipe", type=Path, default=Path("tiny"))
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpa-sweep-") as name:
        folder = Path(name)
        swept = shared(args.recipe, folder, args.overrides)
        times = alone(args.recipe, folder / "alone", args.overrides)
    print(f"{args.recipe} {' '.join(args.overrides)}, {os.cpu_count()} CPUs")
    print(table(swept, times))
    if args.out:
        args.out.write_text(json.dumps({"overrides": args.overrides, **swept, "alone_s": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
