"""How fast are small samples prepared, and in how much memory? Prints a table; each size in a process of its own.

    python -m tests.benchmarks.prepare [--ray] [NUM_SAMPLES ...]

What is measured is what one worker does (all parts, one after the other, without Ray): RSS at its highest, with the
imports, and the rate. With --ray, the same through Ray Data's tasks on a local Ray of two CPUs, started before the clock
is: then also the highest RSS of the largest of Ray's worker processes (with what it maps of the object store). A thousand
small JPEG files are shared by all samples; every one is read, checked and copied.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
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


def measure(num: int, *mode: str) -> dict[str, float]:
    """Rows a second and the highest RSS in bytes of preparing `num` samples, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="dpa_ray-") as temporary:
        source = write_source(Path(temporary) / "set", num)
        command = [sys.executable, "-m", "tests.benchmarks.prepare", "--one", str(source), f"{temporary}/store", *mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def highest_rss(process: int | str = "self") -> int:
    """In bytes, of a process's own memory (getrusage's begins with what the process had that started it)."""
    status = Path(f"/proc/{process}/status").read_text()
    mark = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(mark.split()[1]) * 1024


class LargestWorker:
    """The highest RSS of any of Ray's worker processes below this one; a process's own mark is read, so that nothing
    between two looks is missed but what a process does in its last INTERVAL_S."""

    INTERVAL_S = 0.2

    def __init__(self) -> None:
        self.peak_bytes, self.pids = 0, set[int]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                if not "".join(process.cmdline()).startswith("ray::"):
                    continue
                self.peak_bytes = max(self.peak_bytes, highest_rss(process.pid))
                self.pids.add(process.pid)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self._look()


def _one(source: str, store: str, *mode: str) -> None:
    from dpa_ray.data.prepare import prepare
    from dpa_ray.recipe import SourceSection
    from dpa_ray.store import Store

    with_ray = mode == ("--ray",)
    if with_ray:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        largest = LargestWorker()
    said: list[str] = []
    start = time.perf_counter()
    made = prepare(
        Store(store), SourceSection(source=source), max_quarantined_fraction=0, report=said.append,
        ray_is_ready=lambda: with_ray,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    rates = sum("/s" in line for line in said)
    result = {"rows_per_s": made.num_rows / seconds, "peak_bytes": highest_rss(), "rates_shown": rates}
    if with_ray:
        largest.stop()
        result |= {"worker_peak_bytes": largest.peak_bytes, "num_workers": len(largest.pids)}
        ray.shutdown()
    print(json.dumps(result))


def main(mode: list[str], sizes: list[int]) -> None:
    print(f"{'samples':>9} {'samples/s':>10} {'peak RSS MB':>12}" + f" {'largest worker MB':>18}" * len(mode))
    for size in sizes:
        result = measure(size, *mode)
        more = f" {result['worker_peak_bytes'] / 1e6:>18,.0f}" if mode else ""
        print(f"{size:>9,} {result['rows_per_s']:>10,.0f} {result['peak_bytes'] / 1e6:>12,.0f}" + more)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(*sys.argv[2:])
    else:
        flags = [a for a in sys.argv[1:] if a == "--ray"]
        main(flags, [int(a) for a in sys.argv[1:] if a != "--ray"] or [10_000, 100_000])
