"""How much memory and time do steps of a shuffled epoch take, by the number of samples?

Row groups are full (64 samples). Memory is the peak while the cursor is built and asked, the list of row groups counted.
A step makes its own rows only, wherever it is. A far seek is into another epoch, whose row groups are permuted first.

    python tests/benchmarks/cursor.py --samples 1000000 100000000 --global-batch-size 256 --window 65536
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Iterable

import numpy as np

from dpa_ray.data.cursor import Cursor
from dpa_ray.data.shards import MAX_GROUP_ROWS

COLUMNS = ("samples", "peak MB", "build ms", "first ms", "far seek ms", "shuffled ms", "in order ms")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--global-batch-size", type=int, default=256)
    parser.add_argument("--window", type=int, default=65_536, help="samples that are shuffled together")
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200, help="shuffled steps; in order, ten times as many")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make(num_samples: int, args: argparse.Namespace) -> Cursor:
    row_groups = [MAX_GROUP_ROWS] * -(-num_samples // MAX_GROUP_ROWS)
    return Cursor(
        row_groups,
        seed=args.seed,
        global_batch_size=args.global_batch_size,
        window=args.window,
        fraction=args.fraction,
    )


def peak_mb(num_samples: int, args: argparse.Namespace) -> float:
    """Apart from times, which tracing would spoil."""
    tracemalloc.start()
    cursor = make(num_samples, args)
    for epoch in range(3):
        cursor.rows(epoch, cursor.steps_per_epoch // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def step_times_ms(cursor: Cursor, epoch: int, steps: Iterable[int]) -> list[float]:
    times = []
    for step in steps:
        begun = time.perf_counter()
        cursor.rows(epoch, int(step))
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def measured(num_samples: int, args: argparse.Namespace) -> tuple[float, ...]:
    """A row of COLUMNS."""
    begun = time.perf_counter()
    cursor = make(num_samples, args)
    build = (time.perf_counter() - begun) * 1e3
    last = cursor.steps_per_epoch - 1
    (first,) = step_times_ms(cursor, 0, [0])
    (far_seek,) = step_times_ms(cursor, 5, [last * 3 // 4])  # another epoch: the row groups are permuted anew
    shuffled = np.random.default_rng(args.seed).permutation(last + 1)[: args.steps]
    apart = statistics.median(step_times_ms(cursor, 5, shuffled))
    in_order = statistics.mean(step_times_ms(cursor, 5, range(min(last + 1, 10 * args.steps))))
    return num_samples, peak_mb(num_samples, args), build, first, far_seek, apart, in_order


def main() -> None:
    args = arguments()
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    for num_samples in args.samples:
        samples, *rest = measured(num_samples, args)
        print("  ".join([f"{samples:>11,}", *(f"{value:>11.2f}" for value in rest)]), flush=True)
    print("shuffled: median of a step; in order: mean of a step")


if __name__ == "__main__":
    main()
