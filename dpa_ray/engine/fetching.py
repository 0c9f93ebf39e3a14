"""Who fetches a hub model's files: one process of each node, while its other processes wait."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from huggingface_hub import constants

from dpa_ray.engine.protocol import barrier, gathered, rank
from dpa_ray.errors import UserError
from dpa_ray.model.vlm import ModelRef
from dpa_ray.stages import hub
from dpa_ray.stages.spec import (
    AnyTask,
    BaseLlm,
    BlindTask,
    EvalTask,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyLlmTask,
    Task,
    Weights,
)  # fmt: skip

T = TypeVar("T")


def fetched(task: AnyTask) -> AnyTask:
    """The same task with its hub models in folders of this node, so that nothing more is asked of the hub. All ranks call it.

    Without a hub model nobody waits. What one rank cannot fetch, all raise.
    Raises: UserError where a model is not to be had, or the hub stays away for longer than `data.retry_s`.
    """
    needed = {ref: with_weights for ref, with_weights in needs(task).items() if ref.revision is not None}
    if not needed:
        return task
    error: Exception | None = None
    if rank() == 0 if isinstance(task, MergeTask) else leads():  # others have nothing to merge
        try:
            for ref, with_weights in needed.items():
                hub.here(ref, with_weights=with_weights)
        except Exception as err:
            error = err
    barrier()  # without a time limit, as models take their time; and before what has one
    told = next((text for text in gathered(_told(error)) if text is not None), None)
    if error is not None:
        raise error
    if told is not None:
        raise UserError(told)
    if isinstance(task, MergeTask) and rank() != 0:
        return task
    return _placed(task, {ref: hub.there(ref, with_weights=needed[ref]) for ref in needed})


def _told(error: Exception | None) -> str | None:
    """What the other ranks say where this one has failed."""
    if error is None:
        return None
    return str(error) if isinstance(error, UserError) else f"a model was not fetched: {type(error).__name__}: {error}"


def leads() -> bool:
    """Is this the first rank of those that share a machine and its cache of the hub? All ranks call it."""
    where = gathered((socket.gethostname(), constants.HF_HUB_CACHE))
    return where.index(where[rank()]) == rank()


def needs(task: AnyTask) -> dict[ModelRef, bool]:
    """The models that `task` reads, and whether their weights are read too, not config and tokenizer alone."""
    if isinstance(task, BlindTask):
        reader = needs(task.reader)
        tower = task.reader.tower.ref
        return {ref: with_weights for ref, with_weights in reader.items() if ref != tower}
    if isinstance(task, EvalTask):
        found = [(task.base.weights, False)]
    elif isinstance(task, ProxyLlmTask | MergeTask):
        found = [(task.base.weights, True)]
    elif isinstance(task, InstructTask):
        found = [(task.base.weights, True), (task.tower, True)]
    else:
        found = [(task.tokenizer.weights, not isinstance(task.llm, MergedProxy)), (task.tower, True)]
    return {weights.ref: with_weights for weights, with_weights in found if weights.ref is not None}


def _placed(value: T, places: Mapping[ModelRef, ModelRef]) -> T:
    """`value`, a task or a part of one, with the models where they are on this node."""
    if isinstance(value, Weights):
        return replace(value, ref=places.get(value.ref, value.ref)) if value.ref is not None else value
    changed: dict[str, Any] = {}
    for field in fields(value):  # type: ignore[arg-type]
        part = getattr(value, field.name)
        if isinstance(part, Task | BaseLlm | Weights):
            changed[field.name] = _placed(part, places)
    return replace(value, **changed)  # type: ignore[type-var]
