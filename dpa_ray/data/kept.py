"""What the processes of data tasks keep from one task to the next: the loaders, with what these have read."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpa_ray.data.ingest import Loader

NUM_KEPT = 2
"""Loaders of one process: of a stage and of its held-out data, or of two runs on a cluster."""

UNUSED_S = 60.0
"""How long the one used before stays without a task for it: what it has read takes some 100 MB."""

_LOADERS: OrderedDict[str, tuple[Loader, float]] = OrderedDict()
"""By their digests, the one last used at the end, with when that was (time.monotonic)."""


def digest(loader: Loader) -> str:
    """What tells a loader from others: the same in all ranks of a stage, whose tasks Ray gives to the same processes."""
    from ray import cloudpickle

    return hashlib.sha256(cloudpickle.dumps(loader)).hexdigest()


def loader(key: str, references: list[Any]) -> Loader:
    """The loader with this digest: this process's own, with its footers, row groups and q, or fetched from the store of Ray's
    objects by the reference in `references` (in a list, so that Ray does not fetch it for each task)."""
    import ray

    now = time.monotonic()
    wanted: Loader = _LOADERS.pop(key)[0] if key in _LOADERS else ray.get(references[0])
    _LOADERS[key] = wanted, now
    for other in list(_LOADERS):
        if len(_LOADERS) > NUM_KEPT or now - _LOADERS[other][1] > UNUSED_S:
            del _LOADERS[other]
    return wanted
