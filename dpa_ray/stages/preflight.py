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
        encoder = build.encoder(recipe, stage, vocabulary, spec.num_image_tokens)
        encoder.check()
        _check_rows(encoder, vocabulary)
    _check_window(recipe, vlm.load_llm_config(llm))
    processor_for(vocabulary.tokenizer, build.stage_image_processor(recipe, "instruct", tower, spec), spec)
    return Checked(vocabulary, spec)


def _check_rows(encoder: Encoder, vocabulary: build.Vocabulary) -> None:
    """Raises: UserError where what a template writes has no row in the LLM's embedding (then its lookup would fail)."""
    turns = [Turn("human", "Is it red?"), Turn("gpt", "Yes.")]
    ids = encoder(Sample(None, "a trial conversation", turns)).input_ids
    num_rows = vocabulary.row.num_base_rows
    beyond = sorted({int(i) for i in ids if i >= num_rows and i != vocabulary.row.token_id})
    if beyond:
        names = ", ".join(f"{vocabulary.tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in beyond)
        raise UserError(
            f"model.llm: expected ids below {num_rows}, the rows of the LLM's embedding, found that the "
            f"{encoder.template} template writes {names}; take the tokenizer that belongs to these weights, or add rows"
        )


def _check_window(recipe: Recipe, config: Any) -> None:
    """Raises: UserError where the blind pass would need masks by position, which flash attention does not take."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if recipe.model.attention != "flash_attention_2" or window is None:
        return
    if layer_types is not None and "sliding_attention" not in layer_types:
        return
    for stage in ("proxy_mllm", "instruct"):
        max_length = getattr(recipe.stages, stage).max_length
        if recipe.weights(stage) != "uniform" and window < max_length:
            raise UserError(
                f"model.attention=flash_attention_2: expected a sliding window of at least stages.{stage}.max_length="
                f"{max_length}, found {window}: the blind pass then needs masks that flash attention does not take; set "
                f"model.attention=sdpa, or max_length to at most {window}"
            )


def trainables(recipe: Recipe, llm: ModelRef, tower: ModelRef, stages: tuple[str, ...]) -> dict[str, TrainableSet]:
    """What each stage would train, from the configs alone (no weights are read)."""
    checked = preflight(recipe, llm, tower)
    result = {}
    for stage in stages:
        with torch.device("meta"):
            model = _config_only(llm)
        mode = {"proxy_llm": "lora", "proxy_mllm": "frozen"}.get(stage) or recipe.stages.instruct.llm
        if mode == "lora":
            section = getattr(recipe.stages, stage).lora
            with torch.device("meta"):
                lora.attach(model, rank=section.rank, alpha=section.alpha, dropout=section.dropout, seed=recipe.seed)
        if stage != "proxy_llm":
            with torch.device("meta"):
                vlm.append_image_row(model, checked.vocabulary.row)
                config = vlm.llava_config(model.config, checked.tower, checked.vocabulary.row)
                whole: Any = LlavaForConditionalGeneration(config)
            whole.model.language_model, whole.lm_head = model.base_model, model.get_output_embeddings()
            model = whole
        result[stage] = select_trainable(model, stage, mode)
    return result


def _config_only(ref: ModelRef) -> Any:
    return AutoModelForCausalLM.from_config(vlm.load_llm_config(ref))
