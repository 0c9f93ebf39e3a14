"""How often is each byte of the shards read? The product's own order of samples, played through the readers' caches.

Rows of a shuffle window are dealt out to all decode processes, and each reads whole row groups: with many processes a
row group is read by many of them.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dpa_ray.data.cursor import Cursor, num_passes
from dpa_ray.data.ingest import CACHE_BYTES
from dpa_ray.data.shards import MAX_GROUP_BYTES, MAX_GROUP_ROWS

MAX_ROWS = 1 << 16
"""Samples played through: about one window of the default size."""


def rows_per_group(bytes_per_sample: float) -> int:
    """As shards are written."""
    return int(np.clip(MAX_GROUP_BYTES // max(1.0, bytes_per_sample), 1, MAX_GROUP_ROWS))


def amplification(
    num_samples: int,
    bytes_per_sample: float,
    *,
    window: int,
    batch: int,
    micro_batch_size: int,
    num_workers: int,
    tasks_per_worker: int,
) -> float:
    """Bytes read for each byte of an epoch's shards, at least 1 over a whole epoch.

    Each worker's micro-batches go round its `tasks_per_worker` decode processes (Ray may use others: then it is more).
    """
    per_group = rows_per_group(bytes_per_sample)
    played = min(num_samples, max(window, 1), MAX_ROWS)
    num_groups = -(-played // per_group)
    cursor = Cursor([per_group] * num_groups, seed=0, global_batch_size=batch, window=window)
    kept = max(1, int(CACHE_BYTES // (per_group * max(1.0, bytes_per_sample))))
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_workers * tasks_per_worker)]
    num_read = 0
    for step in range(cursor.steps_per_epoch):
        groups = cursor.rows(0, step) // per_group
        passes = num_passes(len(groups), num_workers, micro_batch_size)
        for place, group in enumerate(groups.tolist()):
            inside, worker = divmod(place, num_workers)  # as `shares` deals them out
            turn = (step * passes + inside // micro_batch_size) % tasks_per_worker
            cache = caches[worker * tasks_per_worker + turn]
            if group in cache:
                cache.move_to_end(group)
                continue
            num_read += 1
            cache[group] = None
            if len(cache) > kept:
                cache.popitem(last=False)
    return num_read / num_groups
