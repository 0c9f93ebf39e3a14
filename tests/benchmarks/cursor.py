"""What does the cursor cost for many samples? Prints a table: memory, and time of a step, of a seek and of an epoch's start.

python -m tests.benchmarks.cursor [NUM_SAMPLES ...]
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from dpa_ray.data.cursor import Cursor

GROUP_ROWS, GLOBAL_BATCH, WINDOW = 64, 256, 65_536


def main(sizes: list[int]) -> None:
    print(f"{'samples':>13} {'peak MB':>8} {'first step ms':>14} {'step us':>8} {'seek ms':>8}")
    for size in sizes:
        groups = np.full(max(1, size // GROUP_ROWS), GROUP_ROWS)
        tracemalloc.start()
        made = Cursor(groups, seed=0, global_batch_size=GLOBAL_BATCH, window=WINDOW)  # type: ignore[arg-type]
        made.rows(0, made.steps_per_epoch // 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        cursor = Cursor(groups, seed=0, global_batch_size=GLOBAL_BATCH, window=WINDOW)  # type: ignore[arg-type]
        first = _seconds(lambda cursor=cursor: cursor.rows(0, 0))  # type: ignore[misc]
        num = min(2048, cursor.steps_per_epoch)  # several windows, so that their permutations are in the mean
        start = time.perf_counter()
        for step in range(num):
            cursor.rows(0, step)
        mean = (time.perf_counter() - start) / num
        places = np.random.default_rng(0).integers(0, cursor.steps_per_epoch, 50)
        seek = np.mean([_seconds(lambda s=int(s), cursor=cursor: cursor.rows(0, s)) for s in places])  # type: ignore[misc]
        print(f"{size:>13,} {peak / 1e6:>8.1f} {first * 1e3:>14.1f} {mean * 1e6:>8.1f} {seek * 1e3:>8.2f}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1_000_000, 10_000_000, 100_000_000])
