"""Log-probability and logit of each target from its hidden state, without ever holding all logits.

Logits are made in chunks of rows and forgotten. What the backward needs of them is made again where the head is
trained; where it is frozen the forward leaves d log_prob / d hidden, (N, D), and the backward only scales it.
Shape letters: N targets, C rows of a chunk, D width, V vocabulary rows in the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpa_ray.model.cmo import TargetScores

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""fp32 logits of a chunk: on a CPU what stays near its cache, on a GPU enough rows for a large matrix product."""


class TargetScorer(nn.Module):
    """The head on target positions. It holds the head's own parameters, so that whatever gathers sharded parameters
    around a module's forward and backward (ZeRO-3) does it once a call, however many chunks there are."""

    def __init__(self, head: nn.Linear, *, softcap: float | None, num_rows: int | None, chunk_bytes: int | None = None):
        """
        Args:
            head: the language model's; its parameters are shared, not copied.
            softcap: final logit soft-capping (Gemma-2: cap * tanh(logit / cap)), or None.
            num_rows: vocabulary rows in the softmax (an appended image row is not), or None for all.
            chunk_bytes: of a chunk's logits; None is the device's CHUNK_BYTES.
        """
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.softcap, self.num_rows, self.chunk_bytes = softcap, num_rows, chunk_bytes

    def score(self, hidden_ND: Tensor, target_N: Tensor) -> TargetScores:
        """Scores of `target_N` (N,) int64 from `hidden_ND`; only `log_prob` carries a gradient."""
        return TargetScores(*self(hidden_ND, target_N))

    def forward(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """`score` as a tuple: DeepSpeed's hooks, which gather for the backward, do not look into a dataclass."""
        num_rows = self.num_rows or self.weight.shape[0]
        size = self.chunk_bytes or CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cuda"])
        found: tuple[Tensor, Tensor] = _Score.apply(
            hidden_ND, self.weight, self.bias, target_N, self.softcap, num_rows, max(1, size // (4 * num_rows))
        )
        return found


class _Score(torch.autograd.Function):
    """(log_prob, logit), each (N,), in float32 whatever the head's dtype (p and q are subtracted); float64 stays."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None,
        num_rows: int, chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.softcap, ctx.num_rows, ctx.chunk_rows = softcap, num_rows, chunk_rows
        head_is_frozen = not any(ctx.needs_input_grad[1:3])
        ctx.slope = torch.empty_like(hidden) if head_is_frozen and ctx.needs_input_grad[0] else None
        log_prob = hidden.new_empty(len(hidden), dtype=_exact(hidden))
        logit = torch.empty_like(log_prob)
        for part in _chunks(len(hidden), chunk_rows):
            logits, slope_of_cap = _logits(hidden[part], weight, bias, softcap, num_rows, ctx.slope is not None)
            chosen = target[part].unsqueeze(1)
            logit[part] = logits.gather(1, chosen).squeeze(1)
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            log_prob[part] = logit[part] - largest.squeeze(1) - total.squeeze(1).log()
            if ctx.slope is not None:
                slope = _slope(logits.div_(total), chosen, slope_of_cap)
                ctx.slope[part] = slope.to(weight.dtype) @ weight[:num_rows]
        if ctx.slope is None:
            ctx.save_for_backward(hidden, weight, bias, target)
        ctx.mark_non_differentiable(logit)
        return log_prob, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        none = (None,) * 4
        if ctx.slope is not None:
            return (ctx.slope * grad.unsqueeze(1)).to(ctx.slope.dtype), None, None, *none
        hidden, weight, bias, target = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = slice(0, ctx.num_rows)
        several = len(hidden) > ctx.chunk_rows
        # A sum over chunks in bf16 would lose what the later ones add.
        exact = _exact(weight) if several else weight.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_exact(bias)) if needs_bias else None
        for part in _chunks(len(hidden), ctx.chunk_rows):
            logits, slope_of_cap = _logits(hidden[part], weight, bias, ctx.softcap, ctx.num_rows, True)
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            slope = _slope(logits.div_(total), target[part].unsqueeze(1), slope_of_cap).mul_(grad[part].unsqueeze(1))
            if grad_bias is not None:
                grad_bias[rows] += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight[rows], out=grad_hidden[part])
            if grad_weight is None:
                continue
            if exact == weight.dtype:
                grad_weight[rows].addmm_(slope.t(), hidden[part])
            else:
                grad_weight[rows] += slope.t() @ hidden[part]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *none


def _exact(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, num_rows: int, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(C, V) fp32 logits, which the caller may overwrite, and d logits / d head output where it is not 1."""
    logits = hidden @ weight[:num_rows].t()
    if bias is not None:
        logits += bias[:num_rows]
    logits = logits.to(_exact(logits))
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square() if with_slope else None
    return logits.mul_(softcap), slope


def _slope(probability: Tensor, chosen: Tensor, slope_of_cap: Tensor | None) -> Tensor:
    """d log_prob / d head output (C, V), in place of `probability`; `chosen` (C, 1)."""
    slope = probability.neg_()
    slope.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=slope.dtype))
    return slope if slope_of_cap is None else slope.mul_(slope_of_cap)
