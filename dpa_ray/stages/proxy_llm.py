"""Stage 1: a LoRA of the base LLM (or, for an ablation, all of it) learns the captions' language; and its merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.stages import build
from dpa_ray.stages.spec import FullProxy, MergeTask, ProxyLlmTask, precision_dtype
from dpa_ray.store.fs import Store

VERSION = 3
"""Raise when a change of code changes this stage's result: it is part of the key."""

FULL_FILE = "llm.safetensors"
"""In the artifact of a proxy that was trained in full: every parameter by its name in the base LLM."""


def build_stage(task: ProxyLlmTask, store: Store) -> build.Built:
    """Base LLM + LoRA on all linear layers but the head, or the LLM in full; captions alone; next-token cross-entropy."""
    recipe, section = task.recipe, task.recipe.stages.proxy_llm
    ref = task.base.weights.located(store)
    vocab = build.vocabulary(ref, recipe)
    llm = vlm.load_llm(ref, precision_dtype(recipe), recipe.model.attention)
    vlm.check_head(llm)
    build.checkpointing(llm, section.gradient_checkpointing)
    peft_model: Any = None
    if section.llm == "lora":
        peft_model = lora.attach(
            llm, rank=section.lora.rank, alpha=section.lora.alpha, dropout=section.lora.dropout, seed=recipe.seed
        )
    # `llm` itself stays without the <image> row: its captions have no image, and what is saved is the base LLM's.
    module = build.step_module(llm, recipe, "proxy_llm", vocab.row, llm.config)

    def save(tensors: dict[str, Tensor], folder: Path) -> None:
        if peft_model is None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FULL_FILE)
            return
        lora.save_adapter(peft_model, _as_peft_names(tensors), folder, base_name=task.base.weights.name)

    return build.Built(module, section.llm, build.encoder(recipe, "proxy_llm", vocab, 0), None, save)


def _as_peft_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names inside the LLM as the PeftModel around it has them."""
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def merge(task: MergeTask, store: Store, folder: Path) -> None:
    """Write the base LLM with stage 1's adapter merged, or with all that it trained, in the run's precision, as transformers
    loads it."""
    ref = task.base.weights.located(store)
    llm: Any = vlm.load_llm(ref, precision_dtype(task.recipe))
    made = task.adapter.artifact.fetched(store)
    merged = _with_all(llm, made / FULL_FILE) if isinstance(task.adapter, FullProxy) else lora.merge(llm, made)
    with vlm.quiet_loading():
        merged.save_pretrained(folder)


def _with_all(llm: Any, file: Path) -> Any:
    """`llm` with the parameters of `file`. Raises: UserError where they are not its own."""
    tensors, own = load_file(file), dict(llm.named_parameters())
    found, expected = ({name: tuple(t.shape) for name, t in of.items()} for of in (tensors, own))
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = wrong[0]
        raise UserError(
            f"{file}: expected the {len(expected)} parameters of {llm.config._name_or_path}, found others in {len(wrong)} "
            f"places, the first {name}: expected {expected.get(name)}, found {found.get(name)}"
        )
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])
    return llm
