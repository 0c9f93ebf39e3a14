"""Which positions of the last decoder layer does anybody read? What it would compute of the others is left out.

The loss reads the last layer's output where a target is predicted; of every other position only key and value are used.
Query, attention output and MLP are functions of one position each, so that they are computed on the positions that are
read, and 0 stands in the place of the others: their output is wrong and never looked at. What remains is exact.
Shape letters: B rows, T positions, K positions that are read, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WORTH_WHILE = 0.75
"""Where more than this part of all positions is read, picking them costs more than it saves."""


KNOWN = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron",
    "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Families (`model_type`) that a test compares. Names of modules do not tell: what `q_proj` makes goes through a convolution
over positions in Kimi Linear, for one, and what is then missing would be missed without a word."""


@contextmanager
def only_read(decoder: Any, row_N: Tensor, column_N: Tensor, shape: Sequence[int]) -> Iterator[None]:
    """Within, a call of `decoder` computes its last layer where it is read, and not elsewhere.

    Args:
        decoder: a transformers decoder; one that is not of a KNOWN family, or whose layers are compiled, computes all.
        row_N, column_N: (N,) int64 each: what is read of its output, in any order, repetitions allowed.
        shape: (B, T) of its output.
    """
    parts = _parts_by_position(decoder)
    if not parts:
        yield
        return
    # Position 0 is always computed: no part may be called with nothing, as other ranks may wait for it (ZeRO-3).
    index_K = torch.unique(torch.cat([row_N.new_zeros(1), row_N * shape[1] + column_N]))
    # Recomputing the layer in its backward would free nothing: it is the first whose activations are asked for. This must
    # not depend on what a rank reads: under ZeRO-3 a layer that is recomputed is gathered in another order.
    last, hooks = decoder.layers[-1], []
    recomputed = last.gradient_checkpointing
    last.gradient_checkpointing = False
    if len(index_K) <= WORTH_WHILE * shape[0] * shape[1]:
        for part in parts:
            hooks.append(part.register_forward_pre_hook(lambda _, args: _picked(index_K, *args)))
            hooks.append(part.register_forward_hook(lambda _, __, output: _put_back(output, index_K, shape)))
    try:
        yield
    finally:
        last.gradient_checkpointing = recomputed
        for hook in hooks:
            hook.remove()


def leaves_out(decoder: Any) -> bool:
    """Is the last layer's MLP computed only where it is read? Not where the layer is compiled."""
    mlp = decoder.layers[-1].mlp if _parts_by_position(decoder) else None
    return any(part is mlp for part in _parts_by_position(decoder))


def _parts_by_position(decoder: Any) -> list[nn.Module]:
    """The modules of the last layer whose output at a position depends on that position alone."""
    layers = getattr(decoder, "layers", None) if decoder.config.model_type in KNOWN else None
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    if last is None or last._compiled_call_impl is not None:
        return []
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    if hasattr(mlp, "down_proj") and not hasattr(mlp, "experts"):
        parts.append(mlp)
    return [part for part in parts if isinstance(part, nn.Module)]


def _picked(index_K: Tensor, hidden_BTD: Tensor, *others: Any) -> tuple[Any, ...]:
    return hidden_BTD.flatten(0, 1)[index_K].unsqueeze(0), *others


def _put_back(output_1KD: Tensor, index_K: Tensor, shape: Sequence[int]) -> Tensor:
    whole = output_1KD.new_zeros(shape[0] * shape[1], output_1KD.shape[-1])
    return whole.index_copy(0, index_K, output_1KD[0]).unflatten(0, shape)
