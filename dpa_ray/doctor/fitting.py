"""Does each stage fit on the devices there are, and would another ZeRO stage?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpa_ray.doctor import memory
from dpa_ray.doctor.activations import count_kept
from dpa_ray.doctor.cluster import Nodes
from dpa_ray.doctor.findings import Check, Findings
from dpa_ray.doctor.memory import GIB, ZERO_STAGES, Counts, Estimate, Pictures
from dpa_ray.engine import placing
from dpa_ray.model.tower import TowerSpec
from dpa_ray.recipe import Recipe
from dpa_ray.stages.spec import precision_dtype

NEARLY_FULL = 0.9
"""Of a device's memory: beyond it, an estimate may be too low by what fragmentation takes."""


@dataclass(frozen=True)
class Device:
    """What one worker has to itself."""

    what: str  # in words
    num_bytes: int  # 0: not known
    is_gpu: bool


@dataclass(frozen=True)
class Fit:
    """One stage on one device, for each way of sharding (None is the plain engine)."""

    stage: str
    num_positions: int  # of a row: the longest sample looked at, or max_length
    estimates: Mapping[int | None, Estimate]
    at_max_length: Mapping[int | None, Estimate]  # every sample of a micro-batch as long as max_length allows
    problem: str = ""  # why the decoder's activations are left out, if they are


def device(recipe: Recipe, nodes: Nodes, gpu_bytes: int) -> Device:
    """`gpu_bytes`: what the user says that the GPUs will have, or 0."""
    cluster = recipe.cluster
    if cluster.gpus_per_worker:
        return Device("GPU", gpu_bytes or nodes.gpu_bytes, True)
    found = placing.place(nodes.resources, cluster, recipe.data.workers, nodes.labels)
    shares = [node.memory_bytes // num for node, num in zip(nodes.nodes, found.workers_by_node, strict=True) if num]
    return Device("worker's share of its node's memory", min(shares, default=0), False)


def decoder_of(stage: str, model: Any) -> Any:
    """The LLM without its head, of a stage's model."""
    return model.base_model if stage == "proxy_llm" else model.model.language_model


def judge_attention(models: Mapping[str, Any], recipe: Recipe, check: Check) -> None:
    """Warns where GPUs would train with transformers' eager attention, though nobody asked for it. `models`: by stage."""
    configs = [decoder_of(stage, model).config for stage, model in models.items()]
    if recipe.model.attention == "auto" and any(config._attn_implementation == "eager" for config in configs):
        check.warn(
            f"attention: for a {configs[0].model_type} transformers itself takes the eager one, which keeps and moves all "
            "scores; model.attention=flex_attention is fused"
        )


def fit(
    recipe: Recipe, stage: str, model: Any, counts: Counts, tower: TowerSpec | None, longest: int | None, on_gpu: bool
) -> Fit:
    """The estimates of one stage. `model` is on the meta device; `longest` is None where no sample was looked at."""
    section = getattr(recipe.stages, stage)
    # fewer workers hold more each: of an elastic run, the fewest count
    world_size = recipe.cluster.min_workers
    num_rows = min(section.micro_batch_size, -(-section.global_batch_size // world_size))
    model.to(precision_dtype(recipe))
    decoder = decoder_of(stage, model)
    if recipe.model.attention != "auto":
        decoder.config._attn_implementation = recipe.model.attention
    with_images = stage != "proxy_llm" and tower is not None
    pictures = None
    if with_images and tower is not None:
        config = tower.config
        pictures = Pictures(config.num_hidden_layers, config.hidden_size, tower.num_image_tokens, tower.image_size)

    problem = ""

    def of(num_positions: int) -> dict[int | None, Estimate]:
        nonlocal problem
        kept = 0
        try:
            counted = count_kept(decoder, num_rows, num_positions, inputs_train=with_images)
            kept = memory.kept_bytes(counted, checkpointing=section.gradient_checkpointing)
        except (RuntimeError, NotImplementedError, TypeError) as err:  # what only computes with numbers
            first = (str(err).strip().splitlines() or [type(err).__name__])[0]
            problem = (
                f"{stage}: what a {decoder.config.model_type} keeps for the backward cannot be counted without computing "
                f"({first}); the estimates leave it out. Leave room, or try a few steps (stages.{stage}.max_steps)"
            )
        ways: tuple[int | None, ...] = ZERO_STAGES if recipe.engine == "deepspeed" else (None,)
        return {
            way: memory.estimate(
                counts, zero_stage=way, world_size=world_size, bf16=recipe.precision == "bf16",
                num_slots=num_rows * num_positions, num_targets=num_rows * num_positions, kept=kept, pictures=pictures,
                num_images=num_rows if with_images else 0, on_gpu=on_gpu,
            )
            for way in ways
        }  # fmt: skip

    positions = min(longest or section.max_length, section.max_length)
    return Fit(stage, positions, of(positions), of(section.max_length), problem)


def judge(fits: list[Fit], recipe: Recipe, on: Device, check: Check, findings: Findings) -> None:
    """Warn and fail where an estimate is more than there is; put all of them into the stages' values."""
    way = recipe.deepspeed.zero_stage if recipe.engine == "deepspeed" else None
    for found in fits:
        values = findings.stage(found.stage)
        values["memory"] = [
            {
                "zero_stage": w,
                "is_chosen": w == way,
                **e.to_dict(),
                "total_at_max_length_bytes": found.at_max_length[w].total,
            }
            for w, e in found.estimates.items()
        ]
        values["memory_positions"] = found.num_positions
        if found.problem:
            check.warn(found.problem)
        total, most = found.estimates[way].total, found.at_max_length[way].total
        if not on.num_bytes:
            continue
        there = f"the {gib(on.num_bytes)} of a {on.what}"
        fitting = [w for w, e in found.estimates.items() if e.total <= NEARLY_FULL * on.num_bytes and w != way]
        advice = _advice(found, recipe, fitting)
        if total > on.num_bytes:
            check.fail(f"{found.stage}: expected at most {there}, found a need of about {gib(total)}; {advice}")
        elif total > NEARLY_FULL * on.num_bytes:
            check.warn(f"{found.stage}: about {gib(total)} come near to {there}; {advice}")
        elif most > on.num_bytes:
            check.warn(
                f"{found.stage}: a micro-batch of samples as long as max_length would need about {gib(most)}, more than {there} "
                f"(with samples of {found.num_positions:,} tokens, the longest looked at: {gib(total)}); {advice}"
            )
    if not on.num_bytes:
        check.note(
            f"it is not known how much memory a {on.what} has: --gpu-memory GIB compares with what will be there"
        )
        return
    check.note(f"compared with the {gib(on.num_bytes)} of a {on.what}; estimates, of the worst moment of a step")


def judge_loading(counts: Mapping[str, Counts], recipe: Recipe, nodes: Nodes, check: Check) -> None:
    """Has each node room for the model of each of its workers? They load it into its own memory first, whole."""
    whole = max(c.whole for c in counts.values()) * precision_dtype(recipe).itemsize
    placed = placing.place(nodes.resources, recipe.cluster, recipe.data.workers, nodes.labels).workers_by_node
    for node, num in zip(nodes.nodes, placed, strict=True):
        if node.memory_bytes and num * whole > node.memory_bytes:
            check.warn(
                f"{num} workers on one node load {gib(whole)} each into its memory before it goes to the GPU: expected room for "
                f"{gib(num * whole)}, found {gib(node.memory_bytes)}; take nodes with more memory, or fewer workers on each"
            )
            return


def _advice(found: Fit, recipe: Recipe, fitting: list[int | None]) -> str:
    section = getattr(recipe.stages, found.stage)
    ways = []
    if section.micro_batch_size > 1:
        ways.append(f"lower stages.{found.stage}.micro_batch_size={section.micro_batch_size} (same result)")
    if not section.gradient_checkpointing:
        ways.append(f"set stages.{found.stage}.gradient_checkpointing=true (same result)")
    if fitting:
        ways.append(f"deepspeed.zero_stage={fitting[0]} would fit")
    ways.append(f"lower stages.{found.stage}.max_length={section.max_length}")
    return ", or ".join(ways)


def gib(num_bytes: int) -> str:
    """As a person reads it."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
