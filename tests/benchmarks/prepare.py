"""How fast are small samples prepared, and in how much memory? Prints a table; each size in a process of its own.

    python -m tests.benchmarks.prepare [NUM_SAMPLES ...]

What is measured is what one worker does (all parts, one after the other, without Ray): RSS at its highest, with the
imports, and the rate. A thousand small JPEG files are shared by all samples; every one is read, checked and copied.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

NUM_IMAGES = 1000


def write_source(folder: Path, num: int) -> Path:
    """LLaVA JSONL of `num` samples with an image each."""
    (folder / "im").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(file, "JPEG")
        (folder / "im" / f"{i}.jpg").write_bytes(file.getvalue())
    with (folder / "set.jsonl").open("w") as out:
        for i in range(num):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {i}. " * 10}]
            out.write(json.dumps({"id": i, "image": f"im/{i % NUM_IMAGES}.jpg", "conversations": turns}) + "\n")
    return folder / "set.jsonl"


def measure(num: int) -> dict[str, float]:
    """Rows a second and the highest RSS in bytes of preparing `num` samples, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="dpa_ray-") as temporary:
        source = write_source(Path(temporary) / "set", num)
        command = [sys.executable, "-m", "tests.benchmarks.prepare", "--one", str(source), f"{temporary}/store"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def _one(source: str, store: str) -> None:
    from dpa_ray.data.prepare import prepare
    from dpa_ray.recipe import SourceSection
    from dpa_ray.store import Store

    said: list[str] = []
    start = time.perf_counter()
    made = prepare(
        Store(store), SourceSection(source=source), max_quarantined_fraction=0, report=said.append,
        ray_is_ready=lambda: False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = sum("/s" in line for line in said)
    print(json.dumps({"rows_per_s": made.num_rows / seconds, "peak_bytes": peak, "rates_shown": rates}))


def main(sizes: list[int]) -> None:
    print(f"{'samples':>9} {'samples/s':>10} {'peak RSS MB':>12}")
    for size in sizes:
        result = measure(size)
        print(f"{size:>9,} {result['rows_per_s']:>10,.0f} {result['peak_bytes'] / 1e6:>12,.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(*sys.argv[2:])
    else:
        main([int(a) for a in sys.argv[1:]] or [10_000, 100_000])
