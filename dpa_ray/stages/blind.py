"""Before a stage whose LLM is frozen: what computes q, the probability of every target without the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpa_ray.data.encode import Encoder
from dpa_ray.model import vlm
from dpa_ray.stages import build
from dpa_ray.stages.proxy_mllm import frozen_llm
from dpa_ray.stages.spec import BlindTask, InstructTask, precision_dtype
from dpa_ray.store.fs import Store

VERSION = 2
"""Raise when a change of code changes q: it is part of the key."""


@dataclass
class BlindBuilt:
    """The stage's LLM, frozen, and how it is read."""

    llm: Any
    softcap: float | None
    num_softmax_rows: int | None


def encoder(task: BlindTask, store: Store) -> Encoder:
    """The stage's own, image tokens included: they decide the positions, and where a sample is cut."""
    reader = task.reader
    base = reader.base if isinstance(reader, InstructTask) else reader.tokenizer
    vocab = build.vocabulary(base.weights.located(store), task.recipe)
    return build.encoder(task.recipe, reader.stage, vocab, task.num_image_tokens)


def build_blind(task: BlindTask, store: Store) -> BlindBuilt:
    """The LLM as the stage has it, without tower and connector."""
    reader, recipe = task.reader, task.recipe
    if isinstance(reader, InstructTask):
        ref = reader.base.weights.located(store)
        vocab, llm = build.vocabulary(ref, recipe), vlm.load_llm(ref, precision_dtype(recipe), recipe.model.attention)
    else:
        vocab, llm = frozen_llm(reader, store)
    softcap = vlm.softcap_of(llm.config)
    vlm.append_image_row(llm, vocab.row)
    return BlindBuilt(llm.eval().requires_grad_(False), softcap, vocab.row.num_softmax_rows)
