"""The plain-torch engine: data parallel by one all-reduce per step. Small, and what DeepSpeed is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.engine.protocol import OptimizerSettings, Unsharded, emptied, rank, trained_names, world_size
from dpa_ray.engine.state import Fragment, num_updates
from dpa_ray.model.step import StepModule, StepSums


class PlainEngine:
    """Engine (see protocol.py) without sharding. Gradients are accumulated and summed over ranks in fp32."""

    replicated = True
    sharded = False

    def __init__(self, module: StepModule, settings: OptimizerSettings, device: torch.device):
        self.module = module.to(device)
        self.device = device
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.unsharded = Unsharded(self.parameters, settings)
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def forward(self, batch: Batch) -> StepSums:
        sums: StepSums = self.module(batch.to(self.device))
        return sums

    def backward(self, loss: Tensor, *, last: bool) -> None:
        del last  # nothing is communicated before `update`
        loss.backward()
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                grad, total = parameter.grad.float(), self.sums[i]
                self.sums[i] = grad if total is None else total.add_(grad)
                parameter.grad = None

    def update(self, divisor: float, lr: float) -> float:
        masters = self.unsharded.masters
        grads = [torch.zeros_like(m) if s is None else s for s, m in zip(self.sums, masters, strict=True)]
        self.sums = [None] * len(masters)
        if world_size() > 1:
            flat = torch.cat([g.reshape(-1) for g in grads])
            torch.distributed.all_reduce(flat)
            grads = [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        return self.unsharded.update(grads, divisor, lr, self.unsharded.optimizer.step)

    def fragments(self) -> list[Fragment]:
        return self.unsharded.fragments(trained_names(self.module))

    def num_updates(self) -> int:
        return num_updates(self.unsharded.optimizer)

    def restored(self, num_updates: int) -> None:
        self.unsharded.restored(num_updates)

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        if rank() != 0:
            return {}
        own = dict(self.module.model.named_parameters(remove_duplicate=False))
        return {name: own[name].detach().cpu().clone() for name in names}

    def close(self) -> None:
        del self.unsharded, self.parameters, self.sums
        emptied(self.module)
