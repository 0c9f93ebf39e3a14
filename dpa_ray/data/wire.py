"""How does a Batch cross from one process to another? As a block of safetensors and some JSON, never a pickle."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from dpa_ray.batch import Arrays, Batch

Packed = tuple[Any, str]
"""The arrays of a batch, as bytes or an array of them, and everything else of it."""


def dumps(arrays: Arrays) -> Packed:
    """The Batch of `arrays`, packed."""
    blocks = {name: np.ascontiguousarray(value) for name, value in arrays.items() if isinstance(value, np.ndarray)}
    return save(blocks), json.dumps({name: value for name, value in arrays.items() if name not in blocks})


def loads(packed: Packed) -> Batch:
    """The batch of the arrays that `dumps` was given."""
    from safetensors.torch import load

    tensors, rest = packed
    values: dict[str, Any] = {**load(bytes(tensors)), **json.loads(rest)}
    values["rows"] = [(digest, row) for digest, row in values["rows"]]
    values["untaught"] = [(row, name, place) for row, name, place in values.get("untaught", [])]
    return Batch(**values)
