"""What can be known to be wrong before anything is started: models, tokenizer, template, image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from dpa_ray.data.encode import Encoder
from dpa_ray.data.sample import Sample, Turn
from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.model.blind import sliding_window_of
from dpa_ray.model.export import processor_for
from dpa_ray.model.tower import TowerSpec, tower_spec
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe
from dpa_ray.stages import build
from dpa_ray.stages.trainable import TrainableSet, select_trainable


@dataclass(frozen=True)
class Checked:
    vocabulary: build.Vocabulary
    tower: TowerSpec


def preflight(recipe: Recipe, llm: ModelRef, tower: ModelRef) -> Checked:
    """Raises: UserError where the models, the tokenizer or its template cannot serve this recipe."""
    vocabulary = build.vocabulary(llm, recipe)
    spec = tower_spec(tower, recipe.model.vision_layer, recipe.model.image_size)
    for stage in ("proxy_mllm", "instruct"):
        check_template(recipe, stage, vocabulary, spec.num_image_tokens)
    check_attention(recipe, llm)
    processor_for(vocabulary.tokenizer, build.stage_image_processor(recipe, "instruct", tower, spec), spec)
    return Checked(vocabulary, spec)


def check_template(recipe: Recipe, stage: str, vocabulary: build.Vocabulary, num_image_tokens: int) -> Encoder:
    """The stage's encoder. Raises: UserError where its template gives no targets, or tokens that have no row."""
    encoder = build.encoder(recipe, stage, vocabulary, num_image_tokens)
    encoder.check()
    _check_rows(encoder, vocabulary)
    return encoder


def check_attention(recipe: Recipe, llm: ModelRef) -> None:
    """Raises: UserError where the workers' devices do not train with that attention, or where the blind pass needs masks by
    position, which flash attention does not take."""
    if recipe.model.attention == "flex_attention" and not recipe.cluster.gpus_per_worker:
        raise UserError(
            "model.attention: flex_attention trains on GPUs only (torch has no backward of it on CPUs), found "
            "cluster.gpus_per_worker 0; expected auto, sdpa or eager"
        )
    window = sliding_window_of(vlm.load_llm_config(llm))
    if window is None or recipe.model.attention != "flash_attention_2":
        return
    for stage in ("proxy_mllm", "instruct"):
        max_length = getattr(recipe.stages, stage).max_length
        if max_length > window:
            raise UserError(
                f"model.attention: in stages.{stage} the pass without the image, which weights, losses of words and held-out "
                f"losses come from, needs masks of its own where the LLM's sliding window ({window}) is shorter than max_length "
                f"({max_length}), and flash_attention_2 takes none; expected sdpa, or a max_length of the window at most"
            )


def _check_rows(encoder: Encoder, vocabulary: build.Vocabulary) -> None:
    """Raises: UserError where the template writes a token that the LLM's embedding has no row for."""
    row = vocabulary.row
    trial = Sample(None, "a trial conversation", [Turn("human", "Is it red?"), Turn("gpt", "Yes.")])
    beyond = [i for i in encoder(trial).input_ids.tolist() if i >= row.num_base_rows and i != row.token_id]
    if beyond:
        raise UserError(
            f"model.llm: its {encoder.template} template writes {vocabulary.tokenizer.convert_ids_to_tokens(beyond[0])!r}, "
            f"token {beyond[0]}; expected a token below {row.num_base_rows}, the rows of the LLM's embedding. Change the "
            "tokenizer's template, or give the LLM a trained row for it"
        )


def trainables(recipe: Recipe, llm: ModelRef, tower: ModelRef, stages: tuple[str, ...]) -> dict[str, TrainableSet]:
    """What each stage would train, from the configs alone (no weights are read)."""
    checked = preflight(recipe, llm, tower)
    return {stage: config_only(recipe, llm, checked, stage)[1] for stage in stages}


def llm_mode(recipe: Recipe, stage: str) -> str:
    """Is the LLM full, lora or frozen in `stage`?"""
    mode: str = "frozen" if stage == "proxy_mllm" else getattr(recipe.stages, stage).llm
    return mode


def config_only(recipe: Recipe, llm: ModelRef, checked: Checked, stage: str) -> tuple[Any, TrainableSet]:
    """The model of `stage` on torch's meta device, and what is trained of it: everything but numbers."""
    mode = llm_mode(recipe, stage)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(vlm.load_llm_config(llm))
        if mode == "lora":
            section = getattr(recipe.stages, stage).lora
            lora.attach(model, rank=section.rank, alpha=section.alpha, dropout=section.dropout, seed=recipe.seed)
        if stage != "proxy_llm":
            vlm.append_image_row(model, checked.vocabulary.row)
            config = vlm.llava_config(model.config, checked.tower, checked.vocabulary.row)
            whole: Any = LlavaForConditionalGeneration(config)
            whole.model.language_model, whole.lm_head = model.base_model, model.get_output_embeddings()
            model = whole
    return model, select_trainable(model, stage, mode)
