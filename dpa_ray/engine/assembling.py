"""What a stage is trained with: its model, its order of samples, its q and its engine, as the task says."""

from __future__ import annotations

from typing import Any

import torch

from dpa_ray.data.blind_scores import BlindScores
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.sizes import ONE_IMAGE, Sizes
from dpa_ray.engine.protocol import Engine, OptimizerSettings, barrier
from dpa_ray.stages import instruct, proxy_llm, proxy_mllm
from dpa_ray.stages.build import Built
from dpa_ray.stages.spec import ArtifactFile, InstructTask, ProxyMllmTask, TrainTask
from dpa_ray.store.fs import Store

ORDERS = {"proxy_mllm": 1}
"""Stage 2 takes the samples of stage 1, but not in its order."""


def build(task: TrainTask, store: Store) -> Built:
    """The stage's model on each rank, all at once: `fetched` has brought what comes from the hub, and artifacts of the store
    are downloaded by one process of a node, for which the others wait.

    All leave together: what comes next has a time limit, and a model may take longer than that to come.
    """
    builders = {"proxy_llm": proxy_llm, "proxy_mllm": proxy_mllm, "instruct": instruct}
    built: Built = builders[task.stage].build_stage(task, store)
    barrier()
    return built


def blind_scores(task: TrainTask, store: Store) -> BlindScores | None:
    """q of the stage's samples, where it was computed beforehand."""
    if not isinstance(task, ProxyMllmTask | InstructTask) or task.blind is None:
        return None
    return BlindScores(task.data, ArtifactFile(store, task.blind), store.url(task.blind.path))


def cursor_of(task: TrainTask, store: Store) -> Cursor:
    """The stage's order of samples."""
    recipe = task.recipe
    section = getattr(recipe.stages, task.stage)
    source = recipe.data.instruct if task.stage == "instruct" else recipe.data.pretrain
    grouped = getattr(section, "group_by_length", False)
    return Cursor(
        [n for _, groups in task.data.shards for n in groups], seed=recipe.seed,
        global_batch_size=section.global_batch_size, window=recipe.data.shuffle_window,
        fraction=source.fraction, order=ORDERS.get(task.stage, 0),
        sizes=Sizes(store, task.data, retry_s=recipe.data.retry_s) if grouped else None, one_image=ONE_IMAGE,
    )  # fmt: skip


def make_engine(built: Built, task: TrainTask, device: torch.device, *, accumulation_steps: int) -> Engine:
    """DeepSpeed or plain torch, as the recipe says."""
    recipe = task.recipe
    section = getattr(recipe.stages, task.stage)
    settings = OptimizerSettings(tuple(section.betas), section.weight_decay, section.grad_clip)
    if recipe.engine == "torch":
        from dpa_ray.engine.plain import PlainEngine

        return PlainEngine(built.module, settings, device)
    from dpa_ray.engine.zero import ZeroEngine

    return ZeroEngine(
        built.module, settings, device, zero_stage=recipe.deepspeed.zero_stage, bf16=recipe.precision == "bf16",
        micro_batch_size=section.micro_batch_size, accumulation_steps=accumulation_steps,
    )  # fmt: skip


def pad_token(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id or 0)


def probe_arguments(built: Built, device: torch.device) -> tuple[Any, torch.device, int]:
    encoder = built.encoder
    size = built.image_processor.crop_size["height"]
    vocab_rows = built.module.num_softmax_rows or built.module.model.get_output_embeddings().out_features
    return instruct.probe_sample(encoder.num_image_tokens, encoder.image_token_id, size), device, vocab_rows


def has_dropout(module: torch.nn.Module) -> bool:
    """Does anything in it draw dropout in training? (Attention does without a module of its own, by its config.)"""
    configs = [getattr(part, "config", None) for part in module.modules()]
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules()) or any(
        isinstance(value, float) and value > 0
        for config in configs if config is not None
        for value in (getattr(config, "attention_dropout", 0.0),)
    )  # fmt: skip
