"""Stage 2: the connector learns captions of images, on the frozen proxy (or, without one, the frozen base LLM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa_ray.model import vlm
from dpa_ray.model.connector_scale import match_embedding_scale
from dpa_ray.stages import build
from dpa_ray.stages.spec import MergedProxy, ProxyMllmTask, precision_dtype
from dpa_ray.store.fs import Store

VERSION = 4
"""Raise when a change of code changes this stage's result: it is part of the key."""


def frozen_llm(task: ProxyMllmTask, store: Store) -> tuple[build.Vocabulary, Any]:
    """The base LLM's vocabulary, and the LLM that this stage reads with and q is computed with: the merged proxy, or the
    base LLM itself."""
    vocab = build.vocabulary(task.tokenizer.weights.located(store), task.recipe)
    if isinstance(task.llm, MergedProxy):
        ref = vlm.ModelRef(str(task.llm.artifact.fetched(store)))
    else:
        ref = task.llm.weights.located(store)
    llm = vlm.load_llm(ref, precision_dtype(task.recipe), task.recipe.model.attention)
    vlm.check_head(llm)
    vlm.disable_dropout(llm)
    return vocab, llm


def build_stage(task: ProxyMllmTask, store: Store) -> build.Built:
    """LLaVA of frozen LLM and frozen tower, the connector from scratch; "plain" template; weighted loss."""
    recipe, section = task.recipe, task.recipe.stages.proxy_mllm
    vocab, llm = frozen_llm(task, store)
    build.checkpointing(llm, section.gradient_checkpointing)
    tower_ref = task.tower.located(store)
    model, spec = build.vision_language_model(llm, store, recipe, tower_ref, vocab.row)
    size = spec.image_size
    match_embedding_scale(model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
    module = build.step_module(model, recipe, "proxy_mllm", vocab.row, llm.config)

    def save(tensors: dict[str, Tensor], folder: Path) -> None:
        vlm.save_connector(tensors, folder)

    return build.Built(
        module, "frozen", build.encoder(recipe, "proxy_mllm", vocab, spec.num_image_tokens),
        build.stage_image_processor(recipe, "proxy_mllm", tower_ref, spec), save,
    )  # fmt: skip
