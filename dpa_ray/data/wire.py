"""How does a Batch cross from one process to another? As a block of safetensors and some JSON, never a pickle."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import torch
from safetensors.torch import load, save

from dpa_ray.batch import Batch


def dumps(batch: Batch) -> tuple[bytes, str]:
    """(tensors, everything else) of `batch`."""
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = value.contiguous()
        else:
            rest[field.name] = value
    return save(tensors), json.dumps(rest)


def loads(tensors: bytes, rest: str) -> Batch:
    """The batch that `dumps` was given."""
    values: dict[str, Any] = {**load(tensors), **json.loads(rest)}
    values["rows"] = [(digest, row) for digest, row in values["rows"]]
    values["untaught"] = [(row, name, place) for row, name, place in values["untaught"]]
    return Batch(**values)
