"""Stage 1: a LoRA of the base LLM learns the captions' language, without images; and its merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dpa_ray.model import lora, vlm
from dpa_ray.stages import build
from dpa_ray.stages.spec import MergeTask, ProxyLlmTask, precision_dtype
from dpa_ray.store.fs import Store

VERSION = 2
"""Raise when a change of code changes this stage's result: it is part of the key."""


def build_stage(task: ProxyLlmTask, store: Store) -> build.Built:
    """Base LLM + LoRA on all linear layers but the head; captions alone; next-token cross-entropy."""
    recipe, section = task.recipe, task.recipe.stages.proxy_llm
    ref = task.base.weights.located(store)
    vocab = build.vocabulary(ref, recipe)
    llm = vlm.load_llm(ref, precision_dtype(recipe), recipe.model.attention)
    vlm.check_head(llm)
    build.checkpointing(llm, section.gradient_checkpointing)
    peft_model = lora.attach(
        llm, rank=section.lora.rank, alpha=section.lora.alpha, dropout=section.lora.dropout, seed=recipe.seed
    )
    # `llm` itself stays without the <image> row: its captions have no image, and the adapter is the base LLM's.
    module = build.step_module(llm, recipe, "proxy_llm", vocab.row, llm.config)

    def save(tensors: dict[str, Tensor], folder: Path) -> None:
        lora.save_adapter(peft_model, _as_peft_names(tensors), folder, base_name=task.base.weights.name)

    return build.Built(module, "lora", build.encoder(recipe, "proxy_llm", vocab, 0), None, save)


def _as_peft_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names inside the LLM as the PeftModel around it has them."""
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def merge(task: MergeTask, store: Store, folder: Path) -> None:
    """Write the base LLM with stage 1's adapter merged, in the run's precision, as transformers loads it."""
    ref = task.base.weights.located(store)
    llm: Any = vlm.load_llm(ref, precision_dtype(task.recipe))
    merged = lora.merge(llm, task.adapter.artifact.fetched(store))
    with vlm.quiet_loading():
        merged.save_pretrained(folder)
