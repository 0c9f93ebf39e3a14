"""What changes a stage's result, and therefore names its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpa_ray.recipe import Recipe, SourceSection
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.stages import blind, build, instruct, proxy_llm, proxy_mllm
from dpa_ray.stages.spec import BLIND, Weights

NOT_IN_KEYS = ("micro_batch_size", "packing", "gradient_checkpointing", "weights", "from")
"""Of a stage's section: how it is computed, not what; weights are in the key as what they resolve to."""

MERGE_VERSION = 1
EVAL_VERSION = 3
FORMAT = 1
"""Raise to make every artifact anew."""

Skipped = Sequence[int | str]
"""Rows that a stage passes over, rising; where its data is not prepared, what the recipe says of them."""


def _section(recipe: Recipe, stage: str) -> dict[str, Any]:
    section = recipe.to_dict()["stages"][stage]
    kept = {k: v for k, v in section.items() if k not in NOT_IN_KEYS}
    if kept.get("llm", "lora") != "lora":
        kept.pop("lora")
    return kept


def _data(recipe: Recipe, source: SourceSection, digest: str, skipped: Skipped) -> dict[str, Any]:
    data = {"digest": digest, "fraction": source.fraction, "shuffle_window": recipe.data.shuffle_window}
    return {**data, "skipped": list(skipped)} if skipped else data


def _weights(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Token weights as they resolve. What is uniform has no bounds, window or blind pass."""
    kind = recipe.weights(stage)
    if kind == "uniform":
        return {"weights": kind}
    return {"weights": kind, "bounds": list(recipe.bounds(stage)), "window": recipe.cmo.window}


def _common(recipe: Recipe, version: int) -> dict[str, Any]:
    return {"format": FORMAT, "version": version, "precision": recipe.precision, "seed": recipe.seed}


def _vision(recipe: Recipe, tower: Weights, stage: str) -> dict[str, Any]:
    model = recipe.model
    return {
        "tower": tower.digest, "vision_layer": model.vision_layer, "image_size": model.image_size,
        "image_aspect": build.aspect(recipe, stage),
    }  # fmt: skip


def proxy_llm_inputs(recipe: Recipe, llm: Weights, data_digest: str, skipped: Skipped = ()) -> dict[str, Any]:
    """Stage 1: the base LLM and the captions."""
    return {
        **_common(recipe, proxy_llm.VERSION), "stage": "proxy_llm", "llm": llm.digest,
        "data": _data(recipe, recipe.data.pretrain, data_digest, skipped), "section": _section(recipe, "proxy_llm"),
    }  # fmt: skip


def merged_inputs(recipe: Recipe, llm: Weights, adapter_key: str) -> dict[str, Any]:
    """The merge of stage 1's result, whose key is `adapter_key`."""
    return {"format": FORMAT, "version": MERGE_VERSION, "stage": "proxy_merged", "llm": llm.digest, "adapter": adapter_key,
            "precision": recipe.precision}  # fmt: skip


def proxy_mllm_inputs(
    recipe: Recipe, llm_key: str, tower: Weights, data_digest: str, skipped: Skipped = ()
) -> dict[str, Any]:
    """Stage 2. `llm_key`: the merged proxy's key, or the base LLM's digest in a method without a proxy."""
    return {
        **_common(recipe, proxy_mllm.VERSION), "stage": "proxy_mllm", "llm": llm_key,
        "proxy": recipe.method in PROXY_METHODS, **_vision(recipe, tower, "proxy_mllm"),
        **_weights(recipe, "proxy_mllm"), "data": _data(recipe, recipe.data.pretrain, data_digest, skipped),
        "section": _section(recipe, "proxy_mllm"),
    }  # fmt: skip


def blind_inputs(
    recipe: Recipe, llm_key: str, num_image_tokens: int, data_digest: str, stage: str = "proxy_mllm"
) -> dict[str, Any]:
    """q of the samples of `stage`, 2 or 3. `llm_key` is that of its frozen LLM: it holds the tokenizer too.

    A stage on all samples has nothing of its order in the key, and any seed, batch size and number of epochs shares q.
    Where it may take fewer (`fraction`, `max_steps`), q is of those alone, and all that chooses them is in the key. What
    the stage passes over has its q all the same.
    """
    section = getattr(recipe.stages, stage)
    source = recipe.data.instruct if stage == "instruct" else recipe.data.pretrain
    chosen: dict[str, Any] = {}
    if source.fraction < 1 or section.max_steps is not None:
        chosen = {"fraction": source.fraction, "seed": recipe.seed}
    if section.max_steps is not None:
        chosen |= {
            "max_steps": section.max_steps, "global_batch_size": section.global_batch_size,
            "shuffle_window": recipe.data.shuffle_window,
        }  # fmt: skip
        if stage == "instruct":
            chosen["group_by_length"] = section.group_by_length
    template = {"template": "plain"}
    if stage == "instruct":
        template = {"template": "chat", "template_date": recipe.model.template_date}
    return {
        "format": FORMAT, "version": blind.VERSION, "stage": BLIND[stage], "llm": llm_key,
        "reader": instruct.VERSION if stage == "instruct" else proxy_mllm.VERSION,  # how it encodes, and in which order
        "precision": recipe.precision, **template, "max_length": section.max_length,
        "num_image_tokens": num_image_tokens, "data": data_digest, "chosen": chosen,
    }  # fmt: skip


def instruct_inputs(
    recipe: Recipe, llm: Weights, tower: Weights, connector_key: str, data_digest: str, skipped: Skipped = ()
) -> dict[str, Any]:
    """Stage 3: the base LLM and stage 2's connector."""
    return {
        **_common(recipe, instruct.VERSION), "stage": "instruct", "llm": llm.digest, "connector": connector_key,
        **_vision(recipe, tower, "instruct"), **_weights(recipe, "instruct"),
        "template_date": recipe.model.template_date,
        "data": _data(recipe, recipe.data.instruct, data_digest, skipped),
        "section": _section(recipe, "instruct"),
    }  # fmt: skip


def eval_inputs(recipe: Recipe, model_key: str, sets: dict[str, str]) -> dict[str, Any]:
    """Held-out answers: the model and the sets."""
    section = recipe.eval
    return {
        "format": FORMAT, "version": EVAL_VERSION, "stage": "eval", "model": model_key, "sets": sets,
        "max_samples": section.max_samples, "max_new_tokens": section.max_new_tokens,
    }  # fmt: skip


def imported_inputs(stage: str, files: dict[str, Any]) -> dict[str, Any]:
    """An artifact taken from what the user has (`stages.X.from`)."""
    return {"format": FORMAT, "stage": stage, "imported": {name: entry["sha256"] for name, entry in files.items()}}
