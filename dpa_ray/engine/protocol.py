"""What the training loop asks of an engine: forward, backward on sums, one update, full tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.engine.state import Fragment, adam_fragment, set_num_updates
from dpa_ray.model.step import StepModule, StepSums

T = TypeVar("T")

LOOK_EVERY_S = 10.0
"""The longest single wait at a barrier."""

_meetings = itertools.count()
"""Numbers of this process's barriers: all ranks come to the same ones."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and clipping. `eps` is torch's default."""

    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    eps: float = 1e-8


class Engine(Protocol):
    """Runs a StepModule over all ranks. Gradients are sums over micro-batches and ranks until `update` divides them."""

    module: StepModule
    parameters: list[torch.nn.Parameter]  # what the optimizer was given

    def forward(self, batch: Batch) -> StepSums: ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last` says that `update` comes next. Every rank calls it equally often."""

    def update(self, divisor: float, lr: float) -> float:
        """Divide the gradients by `divisor`, clip their norm, take one AdamW step, forget them.

        Returns: the norm before clipping; inf where it is not finite, and then nothing was changed.
        """

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Full tensors by `module.model`'s parameter names, on the CPU of rank 0; {} elsewhere. All ranks call it."""

    replicated: bool  # every rank has all fragments
    sharded: bool  # parameters are whole only while all ranks pass through them together

    def fragments(self) -> list[Fragment]:
        """The optimizer's state as far as this rank has it; views, to be read or filled."""

    def num_updates(self) -> int:
        """How many updates changed the parameters."""

    def restored(self, num_updates: int) -> None:
        """The fragments were filled: go on as after `num_updates` updates. All ranks call it."""

    def close(self) -> None:
        """Give back the memory of parameters, gradients and optimizer, whoever still holds them. Neither this nor `module`
        is of use after it: the next task of the same process needs the room."""


def make_optimizer(parameters: list[Tensor], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over `parameters`; its learning rate is set at every update."""
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


class Unsharded:
    """fp32 master copies of trainable parameters (themselves, where they are fp32) and how one update changes them."""

    def __init__(self, parameters: list[torch.nn.Parameter], settings: OptimizerSettings):
        self.parameters = parameters
        self.settings = settings
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self.optimizer = make_optimizer(list(self.masters), settings)

    def fragments(self, names: Sequence[str]) -> list[Fragment]:
        """All state; `names` are the parameters'."""
        return [
            adam_fragment(name, 0, self.optimizer, master, 0, master.numel())
            for name, master in zip(names, self.masters, strict=True)
        ]

    def restored(self, num_updates: int) -> None:
        set_num_updates(self.optimizer, num_updates)
        self._write_back()

    def _write_back(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)

    def update(self, grads: list[Tensor], divisor: float, lr: float, step: Callable[[], None]) -> float:
        """Divide `grads` (fp32, like the masters), clip, let `step` run the optimizer, write the parameters back.

        Returns: the norm before clipping; inf where it is not finite, and then nothing was changed.
        """
        for grad in grads:
            grad.div_(divisor)
        norm = float(torch.nn.utils.get_total_norm(grads))
        for parameter in self.parameters:
            parameter.grad = None
        if not math.isfinite(norm):
            return math.inf
        if self.settings.grad_clip > 0:
            factor = (norm + 1e-6) / self.settings.grad_clip  # as DeepSpeed and torch do
            for grad in grads if factor > 1 else []:
                grad.div_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        step()
        self.optimizer.zero_grad(set_to_none=True)
        self._write_back()
        return norm


def emptied(module: torch.nn.Module) -> None:
    """Let go of the memory of all of a module's tensors, which others may still hold."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.grad = None
        tensor.data = tensor.data.new_empty(0)


def trained_names(module: StepModule) -> list[str]:
    """Names, in `module.model`, of the parameters that are trained, in the order of `module.parameters()`."""
    return [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all ranks."""
    if world_size() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """Every rank's `value`, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Rank 0's `value`, on every rank; it may take rank 0 as long as it likes."""
    barrier()
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait until all ranks are here, however long it takes.

    Collectives have a time limit, and it must not end honest work of one rank that others wait for: loading, merging,
    uploading a model. So this is no collective: ranks count themselves in the store through which torch found them.
    """
    if world_size() == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    meeting = f"dpa_ray/barrier/{next(_meetings)}"
    if store.add(meeting, 1) == world_size():
        store.set(f"{meeting}/all", "here")
    while True:
        try:
            store.wait([f"{meeting}/all"], timedelta(seconds=LOOK_EVERY_S))
            return
        except torch.distributed.DistStoreError:  # not all are here yet
            continue


def limit_waits(timeout_s: float) -> None:
    """Collectives of every group there is give up after `timeout_s`: groups that DeepSpeed made have torch's default."""
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
