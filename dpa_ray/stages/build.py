"""From a task to something that trains: the model with its loss, the encoder, the image processor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from dpa_ray.data.chat import begun_with_bos, pin_template
from dpa_ray.data.encode import Encoder
from dpa_ray.data.sample import Sample, Turn
from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.image_row import ImageRow, add_image_token, load_tokenizer
from dpa_ray.model.last_layer import leaves_out
from dpa_ray.model.step import StepModule
from dpa_ray.model.tower import TowerSpec, image_processor, tower_spec
from dpa_ray.recipe import Recipe
from dpa_ray.store.fs import Store

Save = Callable[[dict[str, Tensor], Path], None]
"""Writes a stage's artifact from its trained tensors (full, by parameter name) into a folder. The module is empty by then."""


@dataclass
class Built:
    """A stage ready to train on one worker."""

    module: StepModule
    llm_mode: str  # full | lora | frozen, for what is trained
    encoder: Encoder
    image_processor: Any  # transformers image processor, or None in the text-only stage
    save: Save
    finish: Callable[[Path, Tensor, torch.device], None] | None = None  # checks of the saved folder, on rank 0


@dataclass
class Vocabulary:
    """Tokenizer with `<image>`, its row, and the template pinned to the recipe's date."""

    tokenizer: Any
    row: ImageRow


def vocabulary(ref: vlm.ModelRef, recipe: Recipe) -> Vocabulary:
    """The base LLM's tokenizer, as every stage uses it and the result is exported with."""
    config = vlm.load_llm_config(ref)
    tokenizer, row = add_image_token(load_tokenizer(ref), config.vocab_size)
    if isinstance(tokenizer.chat_template, dict):  # several by name: "default" is that for chats
        tokenizer.chat_template = _default_template(tokenizer.chat_template, ref)
    if isinstance(tokenizer.chat_template, str):
        template = pin_template(tokenizer.chat_template, recipe.model.template_date)
        tokenizer.chat_template = begun_with_bos(template, tokenizer)
    return Vocabulary(tokenizer, row)


def _default_template(templates: dict[str, str], ref: vlm.ModelRef) -> str:
    if "default" not in templates:
        raise UserError(
            f"model.llm {ref.location}: expected a chat template, or one called default among several, found "
            f"{', '.join(sorted(templates))}"
        )
    return templates["default"]


def weighting(recipe: Recipe, stage: str) -> Weighting:
    lower, upper = recipe.bounds(stage)
    return Weighting(recipe.weights(stage), lower, upper, recipe.cmo.window)


def encoder(recipe: Recipe, stage: str, vocab: Vocabulary, num_image_tokens: int) -> Encoder:
    """The stage's own: text, plain or chat template."""
    template = {"proxy_llm": "text", "proxy_mllm": "plain", "instruct": "chat"}[stage]
    return Encoder(
        tokenizer=vocab.tokenizer, template=template, max_length=getattr(recipe.stages, stage).max_length,  # type: ignore[arg-type]
        num_image_tokens=num_image_tokens, image_token_id=vocab.row.token_id, template_date=recipe.model.template_date,
    )  # fmt: skip


def end_of_turn_id(chat: Encoder) -> int:
    """The token that ends an assistant's turn in the chat template: what generation stops at."""
    trial = chat(Sample(None, "a trial conversation", [Turn("human", "Is it red?"), Turn("gpt", "Yes.")]))
    return int(trial.input_ids[trial.target][-1])


def checkpointing(model: Any, on: bool) -> None:
    """Gradient checkpointing of the decoder (the tower keeps no graph)."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(llm: Any, *, read_whole: bool = False) -> None:
    """Have each decoder layer compiled when it is first called: one program for all, whatever the lengths.

    The last one stays as it is where it is computed only where it is read, which saves more: not in a stage of which most
    positions are read (`read_whole`), and not under flex attention, which is fused only where it is compiled.
    Names of parameters stay, and checkpointing stays around a layer. Raises: UserError where there is no compiler, or
    where the decoder's layers are of a kind that is not known.
    """
    compiler = (os.environ.get("CXX") or "g++").split()[0]  # whose command may have options
    if shutil.which(compiler) is None:
        raise UserError(f"model.compile: expected a C++ compiler on every worker, found no {compiler}; set it to false")
    layers = [part for part in llm.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"model.compile: expected decoder layers to compile in {llm.config.model_type}, found none")
    if not read_whole and leaves_out(llm) and llm.config._attn_implementation != "flex_attention":
        layers = [layer for layer in layers if layer is not llm.layers[-1]]
    for layer in layers:
        layer.compile(dynamic=True)


def vision_language_model(
    llm: Any, store: Store, recipe: Recipe, tower_ref: vlm.ModelRef, row: ImageRow
) -> tuple[Any, TowerSpec]:
    """LLaVA around `llm`, its connector from the recipe's seed."""
    dtype = llm.dtype
    spec = tower_spec(tower_ref, recipe.model.vision_layer, recipe.model.image_size)
    tower = vlm.load_tower(tower_ref, dtype)
    vlm.disable_dropout(tower)
    vlm.append_image_row(llm, row)
    return vlm.assemble(llm, tower, spec, row, dtype=dtype, seed=recipe.seed), spec


def aspect(recipe: Recipe, stage: str) -> str:
    """How images become square in `stage`: the recipe's word, else crop for captions and pad for conversations."""
    own = recipe.data.pretrain.image_aspect if stage == "proxy_mllm" else recipe.data.instruct.image_aspect
    return own or ("crop" if stage == "proxy_mllm" else "pad")


def stage_image_processor(recipe: Recipe, stage: str, ref: vlm.ModelRef, spec: TowerSpec) -> Any:
    return image_processor(ref, spec, aspect(recipe, stage))


def step_module(model: Any, recipe: Recipe, stage: str, row: ImageRow, llm_config: Any) -> StepModule:
    module = StepModule(
        model, weighting(recipe, stage), softcap=vlm.softcap_of(llm_config), num_softmax_rows=row.num_softmax_rows
    )
    if recipe.model.compile:
        compile_layers(module.decoder, read_whole=stage == "proxy_llm")
    return module
