"""What the training loop asks of an engine: forward, backward on sums, one update, full tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.model.step import StepModule, StepSums


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
            factor = max(1.0, (norm + 1e-6) / self.settings.grad_clip)  # as DeepSpeed and torch do
            for grad in grads:
                grad.div_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
        return norm


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
