"""How long is a whole run of dpa beside one of vanilla, stage 1 and the job of q included, and where does it go?

Each round runs `python jobs/run_dpa.py RECIPE method=M` once per method, in an order that alternates, each in a store of
its own that is empty, so that nothing is reused. A part's time is what its artifact says; `rest` is what the clock says
beyond them: imports, Ray's start, data, models, the export. Ratios are medians over rounds of two times of one round.

    python -m tests.benchmarks.whole_run --recipe tiny --rounds 3 --out FILE
    python -m tests.benchmarks.whole_run --recipe tiny stages.instruct.max_steps=20
    python -m tests.benchmarks.whole_run --recipe real --rounds 1

`real` is SmolLM2-135M behind DINOv2-S at 112 px, one worker: 15 steps of 8 stamps' captions in stages 1 and 2, 20 of easy-vqa in 3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import real_assets
from tests.integration.test_real import GLOBAL_BATCH_SIZE, make_recipe

ROOT = Path(__file__).resolve().parents[2]
REAL_STEPS = {"proxy_llm": 15, "proxy_mllm": 15, "instruct": 20}
METHODS = ("vanilla", "dpa")
PARTS = ("proxy-llm", "proxy-merged", "blind", "proxy-mllm", "instruct", "eval")
"""Artifacts that take time, in their order."""

Times = dict[str, float]


def one_run(recipe: str, method: str, overrides: list[str]) -> Times:
    """Seconds of each part, of the rest, and of the whole (`total`), by the clock of this process."""
    with tempfile.TemporaryDirectory(prefix="dpa-whole-") as folder:
        command = [
            sys.executable, "jobs/run_dpa.py", recipe, f"method={method}", *overrides,
            "--store", f"{folder}/store", "--name", method,
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "DPA_RAY_CACHE": f"{folder}/cache"}, capture_output=True, text=True
        )
        total = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        times = dict.fromkeys(PARTS, 0.0)
        for manifest in Path(folder, "store", "artifacts").glob("*/manifest.json"):
            part = manifest.parent.name.rpartition("-")[0]
            if part in times:
                times[part] += json.loads(manifest.read_text())["meta"].get("wall_time_s", 0.0)
    return {**times, "rest": total - sum(times.values()), "total": total}


def real_recipe(folder: Path) -> str:
    """The file of the recipe `real`, with its data beside it."""
    real = real_assets.ensure()
    sources = [
        str(real_assets.subset(file, REAL_STEPS[stage] * GLOBAL_BATCH_SIZE, folder / stage))
        for file, stage in ((real.stamps / "captions.json", "proxy_mllm"), (real.easy_vqa / "train.json", "instruct"))
    ]
    recipe = make_recipe(real, *sources)
    recipe["cluster"]["workers"] = 1
    for stage, num_steps in REAL_STEPS.items():
        recipe["stages"][stage]["max_steps"] = num_steps
    file = folder / "real.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return str(file)


def table(rounds: dict[str, list[Times]]) -> str:
    """Medians of each part by method, and of the ratio to the first method where it has that part."""
    lines = [f"{'':14}" + "".join(f"{method + ', s':>14}" for method in rounds) + f"{'ratio':>8}"]
    base, other = rounds
    for part in (*PARTS, "rest", "total"):
        medians = [statistics.median(times[part] for times in rounds[method]) for method in rounds]
        pairs = [(a[part], b[part]) for a, b in zip(rounds[base], rounds[other], strict=True)]
        ratio = f"{statistics.median(b / a for a, b in pairs):8.3f}" if all(a > 0 for a, _ in pairs) else f"{'-':>8}"
        lines.append(f"{part:14}" + "".join(f"{median:14.1f}" for median in medians) + ratio)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key.path=value, for both methods")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file of all rounds")
    args = parser.parse_args()
    rounds: dict[str, list[Times]] = {method: [] for method in METHODS}
    folder = tempfile.TemporaryDirectory(prefix="dpa-real-")
    recipe = real_recipe(Path(folder.name)) if args.recipe == "real" else args.recipe
    for number in range(args.rounds):
        for method in METHODS if number % 2 == 0 else METHODS[::-1]:
            rounds[method].append(one_run(recipe, method, args.overrides))
            print(f"round {number}, {method}: {rounds[method][-1]['total']:.1f} s", file=sys.stderr, flush=True)
    print(f"{args.recipe} {' '.join(args.overrides)}, {os.cpu_count()} CPUs, medians of {args.rounds} rounds")
    print(table(rounds))
    if args.out:
        values = {"recipe": args.recipe, "overrides": args.overrides, "cpus": os.cpu_count(), "rounds": rounds}
        args.out.write_text(json.dumps({"device": f"cpu {platform.machine()}", **values}, indent=1) + "\n")


if __name__ == "__main__":
    main()
