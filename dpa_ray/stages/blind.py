"""Between the proxy and stage 2: what computes q, the probability of every caption's tokens without the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpa_ray.data.encode import Encoder
from dpa_ray.model import vlm
from dpa_ray.stages import build
from dpa_ray.stages.proxy_mllm import frozen_llm
from dpa_ray.stages.spec import BlindTask
from dpa_ray.store.fs import Store

VERSION = 1
"""Raise when a change of code changes q: it is part of the key."""


@dataclass
class BlindBuilt:
    """Stage 2's LLM, frozen, and how it is read."""

    llm: Any
    softcap: float | None
    num_softmax_rows: int | None


def encoder(task: BlindTask, store: Store) -> Encoder:
    """Stage 2's own, image tokens included: they decide the positions, and where a caption is cut."""
    vocab = build.vocabulary(task.reader.tokenizer.weights.located(store), task.recipe)
    return build.encoder(task.recipe, "proxy_mllm", vocab, task.num_image_tokens)


def build_blind(task: BlindTask, store: Store) -> BlindBuilt:
    """The LLM as stage 2 has it, without tower and connector."""
    vocab, llm = frozen_llm(task.reader, store)
    softcap = vlm.softcap_of(llm.config)
    vlm.append_image_row(llm, vocab.row)
    return BlindBuilt(llm.eval().requires_grad_(False), softcap, vocab.row.num_softmax_rows)
