"""How much does a decoder keep between forward and backward? Counted on torch's meta device, from the config alone.

What autograd saves is asked of autograd itself, so that any decoder, frozen, with a LoRA or trained in full, is counted as
it is; only attention is laid out as the fused kernels of GPUs do it, which keep no (T, T) matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

FUSED = "dpa_ray_fused_on_meta"
"""Name in transformers' table of attention functions."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one micro-batch, without weights."""

    whole: int  # by all layers, without checkpointing
    checkpointed: int  # the layers' inputs, and what one layer keeps while it is computed again
    layer: int  # by one layer


class _FusedAttention(torch.autograd.Function):
    """Shapes alone: q, k, v, the output and one number per query and head are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """(B, H, T, d) each -> (B, T, H, d), as transformers' attention functions give it."""
    output: Tensor = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(FUSED, _fused)
AttentionMaskInterface.register(FUSED, _no_mask)


def count_kept(decoder: Any, num_rows: int, num_positions: int, *, inputs_train: bool) -> Kept:
    """What `decoder` (with `requires_grad` set) keeps of (num_rows, num_positions) embeddings.

    Args:
        decoder: on the meta device, where numbers cost nothing; on another it really computes.
        inputs_train: do the embeddings carry a gradient? (Those behind a connector that is trained do.)
    """
    config = decoder.config
    attention, training = config._attn_implementation, decoder.training
    weights = {id(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    first = next(decoder.parameters())
    options: dict[str, Any] = {"device": first.device}
    saved: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor if tensor._base is None else tensor._base) not in weights:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = (tensor, storage.nbytes())  # held, so that no address is used twice
        return tensor

    if attention != "eager":
        config._attn_implementation = FUSED
    try:
        decoder.train()
        embeds = torch.zeros(num_rows, num_positions, config.hidden_size, dtype=first.dtype, **options)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(
                inputs_embeds=embeds.requires_grad_(inputs_train), use_cache=False,
                position_ids=torch.arange(num_positions, **options).expand(num_rows, -1),
                attention_mask=torch.ones(num_rows, num_positions, dtype=torch.long, **options),
            )  # fmt: skip
    finally:
        config._attn_implementation = attention
        decoder.train(training)
    whole = sum(size for _, size in saved.values())
    num_layers = config.num_hidden_layers
    layer = -(-whole // num_layers)
    inputs = num_layers * embeds.numel() * embeds.element_size()
    return Kept(whole, min(whole, inputs + layer), layer)
