"""Log-probability and logit of each target from its hidden state, without ever holding all logits.

Logits are made in tiles, some targets by a part of the vocabulary, and forgotten; a softmax goes on from tile to tile
(Milakov and Gimelshein 2018, arXiv 1805.02867). So each part of the head is read for many targets at once, and its
gradient is written once. What the backward needs of the logits is made again where the head is trained; where it is
frozen the forward leaves d log_prob / d hidden, (N, D), and the backward only scales it.
Shape letters: N targets, R rows and C columns of a tile, D width, V vocabulary rows in the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpa_ray.model.cmo import TargetScores

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""fp32 logits of a tile: on a CPU what stays near its cache, on a GPU enough for large matrix products."""


class TargetScorer(nn.Module):
    """The head on target positions. It holds the head's own parameters, so that whatever gathers sharded parameters
    around a module's forward and backward (ZeRO-3) does it once a call, however many tiles there are."""

    def __init__(self, head: nn.Linear, *, softcap: float | None, num_rows: int | None, chunk_bytes: int | None = None):
        """
        Args:
            head: the language model's; its parameters are shared, not copied.
            softcap: final logit soft-capping (Gemma-2: cap * tanh(logit / cap)), or None.
            num_rows: vocabulary rows in the softmax (an appended image row is not), or None for all.
            chunk_bytes: of a tile's logits; None is the device's CHUNK_BYTES.
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
            hidden_ND, self.weight, self.bias, target_N, self.softcap, num_rows, max(1, size // 4)
        )
        return found


class _Score(torch.autograd.Function):
    """(log_prob, logit), each (N,), in float32 whatever the head's dtype (p and q are subtracted); float64 stays."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None,
        num_rows: int, tile_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.softcap, ctx.num_rows, ctx.tile_size = softcap, num_rows, tile_size
        head_is_frozen = not any(ctx.needs_input_grad[1:3])
        slope = torch.zeros_like(hidden, dtype=_exact(hidden)) if head_is_frozen and ctx.needs_input_grad[0] else None
        logit = hidden.new_zeros(len(hidden), 1, dtype=_exact(hidden))
        largest, total = torch.full_like(logit, torch.finfo(logit.dtype).min), torch.zeros_like(logit)
        every_row, every_column = _tiles(len(hidden), num_rows, tile_size)
        for columns in every_column:
            for rows in every_row:
                logits, slope_of_cap = _logits(hidden[rows], weight, bias, softcap, columns, slope is not None)
                index, inside = _place(target[rows], columns)
                logit[rows] = torch.where(inside, logits.gather(1, index), logit[rows])
                before = largest[rows].clone()
                largest[rows] = torch.maximum(before, logits.amax(1, keepdim=True))
                shrunk = (before - largest[rows]).exp_()
                odds = logits.sub_(largest[rows]).exp_()
                total[rows] = total[rows] * shrunk + odds.sum(1, keepdim=True)
                if slope is not None:
                    odds = odds if slope_of_cap is None else odds.mul_(slope_of_cap)
                    _add_product(slope[rows].mul_(shrunk), odds.to(weight.dtype), weight[columns])
        if slope is not None:
            own = 1.0 if softcap is None else 1 - (logit / softcap).square()
            ctx.slope = (weight[target] * own - slope.div_(total)).to(hidden.dtype)
        else:
            ctx.slope = None
            ctx.save_for_backward(hidden, weight, bias, target, largest, total)
        log_prob = (logit - largest - total.log()).squeeze(1)
        logit = logit.squeeze(1)
        ctx.mark_non_differentiable(logit)
        return log_prob, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        none = (None,) * 4
        grad = grad.unsqueeze(1)
        if ctx.slope is not None:
            return (ctx.slope * grad).to(ctx.slope.dtype), None, None, *none
        hidden, weight, bias, target, largest, total = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=_exact(hidden)) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_exact(bias)) if needs_bias else None
        scale = -grad / total
        every_row, every_column = _tiles(len(hidden), ctx.num_rows, ctx.tile_size)
        for columns in every_column:
            sums = None  # of several parts of rows, in fp32: in bf16 they would lose what the later ones add
            for rows in every_row:
                logits, slope_of_cap = _logits(hidden[rows], weight, bias, ctx.softcap, columns, True)
                index, inside = _place(target[rows], columns)
                slope = logits.sub_(largest[rows]).exp_().mul_(scale[rows])
                slope.scatter_add_(1, index, (grad[rows] * inside).to(slope.dtype))
                slope = slope if slope_of_cap is None else slope.mul_(slope_of_cap)
                if grad_bias is not None:
                    grad_bias[columns] += slope.sum(0)
                slope = slope.to(weight.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], slope, weight[columns])
                if grad_weight is not None and len(every_row) == 1:
                    torch.mm(slope.t(), hidden[rows], out=grad_weight[columns])
                elif grad_weight is not None:
                    sums = torch.zeros_like(weight[columns], dtype=_exact(weight)) if sums is None else sums
                    _add_product(sums, slope.t(), hidden[rows])
            if grad_weight is not None and len(every_row) != 1:
                grad_weight[columns] = 0 if sums is None else sums
        if grad_weight is not None:
            grad_weight[ctx.num_rows :] = 0
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *none


def _exact(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _tiles(num_targets: int, num_columns: int, size: int) -> tuple[list[slice], list[slice]]:
    """Rows and columns of the tiles, each of `size` logits at most: square where there are targets enough, as that reads
    least for what it computes."""
    num_rows = max(1, min(num_targets, math.isqrt(size)))
    return list(_parts(num_targets, num_rows)), list(_parts(num_columns, max(1, size // num_rows)))


def _parts(num: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num)) for start in range(0, num, size))


def _place(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(R, 1) column of each target in the tile, any where it is not there, and (R, 1) is it there?"""
    inside = (target >= columns.start) & (target < columns.stop)
    return (target - columns.start).clamp(0, columns.stop - columns.start - 1).unsqueeze(1), inside.unsqueeze(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which may be more exact than they are."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, of bf16 in fp32 on an NVIDIA GPU: it is summed in that anyway, and rounding it to bf16 would make of a logit
    of 20 one that is off by up to 0.06. CPUs have no such product."""
    if left.is_cuda and torch.version.cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, columns: slice, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(R, C) fp32 logits, which the caller may overwrite, and d logits / d head output where it is not 1."""
    logits = _product(hidden, weight[columns].t())
    if bias is not None:
        logits += bias[columns]
    logits = logits.to(_exact(logits))
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square() if with_slope else None
    return logits.mul_(softcap), slope
