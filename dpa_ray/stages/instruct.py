"""Stage 3: instruction tuning of the base LLM and stage 2's connector; gives the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa_ray.model import lora, vlm
from dpa_ray.model.export import check_same_logits, export, load_exported, processor_for
from dpa_ray.model.tower import tower_spec
from dpa_ray.stages import build
from dpa_ray.stages.spec import InstructTask, precision_dtype
from dpa_ray.store.fs import Store

VERSION = 4
"""Raise when a change of code changes this stage's result: it is part of the key."""


def build_stage(task: InstructTask, store: Store) -> build.Built:
    """LLaVA of the base LLM (full, LoRA or frozen), frozen tower and stage 2's connector; chat template."""
    recipe, section = task.recipe, task.recipe.stages.instruct
    dtype = precision_dtype(recipe)
    base_ref = task.base.weights.located(store)
    vocab = build.vocabulary(base_ref, recipe)
    llm = vlm.load_llm(base_ref, dtype, recipe.model.attention)
    vlm.check_head(llm)
    if section.llm == "frozen":
        vlm.disable_dropout(llm)
    build.checkpointing(llm, section.gradient_checkpointing)
    if section.llm == "lora":
        settings = section.lora
        lora.attach(llm, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=recipe.seed)
    tower_ref = task.tower.located(store)
    model, spec = build.vision_language_model(llm, store, recipe, tower_ref, vocab.row)
    vlm.load_connector(model, task.connector.artifact.fetched(store) / vlm.CONNECTOR_FILE)
    module = build.step_module(model, recipe, "instruct", vocab.row, llm.config)
    chat = build.encoder(recipe, "instruct", vocab, spec.num_image_tokens)
    processor_images = build.stage_image_processor(recipe, "instruct", tower_ref, spec)

    def save(tensors: dict[str, Tensor], folder: Path) -> None:
        plain, state = _finished_model(task, store, tensors)
        end = build.end_of_turn_id(chat)
        generation = plain.generation_config
        known = generation.eos_token_id if generation.eos_token_id is not None else []
        generation.eos_token_id = sorted({end, *([known] if isinstance(known, int) else known)})
        if generation.pad_token_id is None:
            generation.pad_token_id = vocab.tokenizer.pad_token_id
        export(plain, state, processor_for(vocab.tokenizer, processor_images, spec), folder, dtype)

    def finish(folder: Path, expected: Tensor, device: torch.device) -> None:
        loaded, _ = load_exported(folder)
        # the same kernels: bf16 sums in another order would be other logits
        loaded.model.language_model.config._attn_implementation = llm.config._attn_implementation
        sample = probe_sample(spec.num_image_tokens, vocab.row.token_id, spec.image_size)
        try:
            found = probe_logits(loaded.to(device), sample, device, vocab.row.num_base_rows)
        except torch.OutOfMemoryError:  # it was trained in shares, and is too large for one GPU
            loaded.model.language_model.config._attn_implementation = "eager"
            found = probe_logits(loaded.to("cpu"), sample, torch.device("cpu"), vocab.row.num_base_rows)
        check_same_logits(expected, found)

    return build.Built(module, section.llm, chat, processor_images, save, finish)


def _finished_model(task: InstructTask, store: Store, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A plain LLaVA model and its state: trained tensors, and frozen ones in the dtype of their source."""
    recipe = task.recipe
    base_ref, tower_ref = task.base.weights.located(store), task.tower.located(store)
    mode = recipe.stages.instruct.llm
    llm = vlm.load_llm(base_ref, precision_dtype(recipe) if mode != "frozen" else "auto")
    if mode == "lora":
        settings = recipe.stages.instruct.lora
        peft_model = lora.attach(
            llm, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=recipe.seed
        )
        own = dict(llm.named_parameters())
        for name, tensor in tensors.items():
            if ".lora_" in f".{name}":
                own[name.replace("model.language_model", llm.base_model_prefix, 1)].data.copy_(tensor)
        llm = peft_model.merge_and_unload()
    vocab = build.vocabulary(base_ref, recipe)
    spec = tower_spec(tower_ref, recipe.model.vision_layer, recipe.model.image_size)
    tower = vlm.load_tower(tower_ref, "auto")
    vlm.append_image_row(llm, vocab.row)
    model = vlm.assemble(llm, tower, spec, vocab.row, dtype=precision_dtype(recipe), seed=recipe.seed)
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if ".lora_" not in f".{name}":
            own[name].data.copy_(tensor)
    return model, dict(model.state_dict())


def probe_sample(num_image_tokens: int, image_token_id: int, image_size: int) -> tuple[Tensor, Tensor]:
    """A fixed sample to compare two models on: (1, T) ids with one image, (1, 3, S, S) pixels from a seed."""
    generator = torch.Generator().manual_seed(0)
    text = [i for i in range(9) if i != image_token_id][:8]
    ids = torch.tensor([[text[0], *[image_token_id] * num_image_tokens, *text[1:]]])
    return ids, torch.randn(1, 3, image_size, image_size, generator=generator)


@torch.no_grad()
def probe_logits(model: Any, sample: tuple[Tensor, Tensor], device: torch.device, num_rows: int) -> Tensor:
    """(8, V) logits of the text positions of the probe over the base vocabulary, on the CPU."""
    ids, pixels = sample
    training = model.training
    model.eval()
    try:
        weight = model.model.multi_modal_projector.linear_1.weight
        logits = model(
            input_ids=ids.to(device), pixel_values=pixels.to(device, weight.dtype),
            attention_mask=torch.ones_like(ids).to(device), use_cache=False,
        ).logits  # fmt: skip
    finally:
        model.train(training)
    return torch.cat([logits[0, :1], logits[0, -7:]])[:, :num_rows].cpu()
