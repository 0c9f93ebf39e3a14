"""The engines' tests in processes of their own: every engine over the same few steps, in a world of one and one of two.

    python -m tests.engine_worker FOLDER

Writes FOLDER/<world size>-<rank>.pt, {case name: Outcome}, with torch.save, and what each engine says of a step that is
stopped. `test_engines.py` starts it and compares.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Batch
from dpa_ray.data.cursor import Cursor
from dpa_ray.engine import zero
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import Engine, OptimizerSettings, all_sum
from dpa_ray.engine.zero import ZeroEngine, _import_deepspeed
from dpa_ray.engine.zero import deepspeed_config as zero_config
from dpa_ray.errors import UserError
from dpa_ray.eval.held_out import VISUAL_GAIN
from dpa_ray.model.held_out import nll_sums
from dpa_ray.model.step import StepModule
from dpa_ray.stages.build import checkpointing
from dpa_ray.stages.trainable import select_trainable
from tests.random_models import batch_of, make_step, make_vlm

# What each step takes. Its samples go to the ranks in turn, and in parts to the accumulation passes. With two ranks the
# second one sees text only in step 1, filler only in step 3, and less than the first in step 4; in step 5 nearly all that
# the first sees are targets, which the second's are not.
STEPS: tuple[tuple[str, ...], ...] = (
    ("s1 I t6", "I t5", "s2 I s1 t4 s1 u3", "s1 I t2", "s3 t4"),
    ("s1 I t3", "s4 t5", "I t6", "s2 t9"),
    ("s1 I t9", "I t4", "s2 I t5", "s1 I t1"),
    ("s2 I t8",),
    ("s1 I t5", "s3 I t4", "I s1 t6", "s2 I s3", "s5 t6"),
    ("s1 t9", "s4 I t4", "s1 t8", "s2 t3"),
)
LEARNING_RATES = (1e-3, 2e-3, 4e-4, 8e-4, 2e-4, 4e-4)
BROKEN = 2
"""The step that in some cases has gradients that are not finite."""

HELD_OUT = ("s1 I t5", "s2 t4", "I s1 g2 t3")

# eps is large: with torch's 1e-8 AdamW would turn a gradient of rounding noise into a step of full size. The norm is
# above the clip in some steps, below it in others.
SETTINGS = OptimizerSettings((0.9, 0.95), 0.01, 4.0, eps=1e-4)


@dataclass(frozen=True)
class Case:
    """One run of one engine; `zero_stage` None is the plain one."""

    zero_stage: int | None
    bf16: bool = False
    passes: int = 1  # accumulation passes per step
    fp32_sum: bool = False  # over ranks, as of many
    broken: bool = False  # BROKEN's gradients are NaN
    skipped: bool = False  # BROKEN never happens
    trained: str = "full"  # or "connector", "lora"
    tied: bool = False
    evaluated: bool = False  # before the first step and after every one
    gathered: bool = False  # ZeRO-3 shards small parameters too, and layers are recomputed

    @property
    def name(self) -> str:
        return repr(self)


@dataclass
class Outcome:
    """What a rank saw, of all steps but the broken one. Everything in plain numbers and full tensors."""

    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    broken_norm: float = 0.0
    before_broken: dict[str, Tensor] = field(default_factory=dict)
    after_broken: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)
    num_batches: int = 0
    evaluations: list[Tensor] = field(default_factory=list)  # nll_sums over HELD_OUT and all ranks, after each step


def cases(world_size: int) -> list[Case]:
    """All that differ in a way that could matter; ZeRO 1 and 2 share their code."""
    if world_size == 1:
        found = [Case(stage) for stage in (None, 0, 1, 2, 3)]
        found += [Case(stage, bf16=True, passes=5) for stage in (None, 2, 3)]
        return found + [Case(2, bf16=True)] + [Case(stage, broken=True) for stage in (None, 0, 2, 3)]
    some = (None, 0, 2, 3)
    found = [Case(stage, bf16) for bf16 in (False, True) for stage in (None, 0, 1, 2, 3)]
    found += [Case(stage, bf16=True, broken=True) for stage in some] + [
        Case(stage, bf16=True, skipped=True) for stage in some
    ]
    found += [Case(stage, bf16=True, fp32_sum=True) for stage in (0, 1, 2, 3)]
    found += [Case(stage, passes=2) for stage in some]
    found += [Case(stage, evaluated=True) for stage in some]
    found += [Case(3, gathered=True), Case(3, trained="lora", gathered=True)]
    return found + [Case(2, trained="connector"), Case(3, trained="lora"), Case(2, tied=True), Case(3, tied=True)]


def make_module(case: Case) -> StepModule:
    """Weights smaller than elsewhere: gradients that hang on the last bit of bf16 would say nothing of engines."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    lora_rank = 4 if case.trained == "lora" else None
    model = make_vlm(dtype=dtype, lora_rank=lora_rank, tie_word_embeddings=case.tied, initializer_range=0.15)
    if case.trained == "connector":
        select_trainable(model, "proxy_mllm", "frozen")
    else:
        select_trainable(model, "instruct", case.trained)
    checkpointing(model, case.gathered)
    # p - q of bf16 logits is half noise, which has nothing to do with engines
    return make_step(model, "uniform" if case.bf16 else "prob").train()


def make_engine(case: Case, module: StepModule) -> Engine:
    device = torch.device("cpu")
    if case.zero_stage is None:
        return PlainEngine(module, SETTINGS, device)
    zero.FP32_SUM_FROM = 1 if case.fp32_sum else 64
    with patch.object(zero, "deepspeed_config", all_gathered if case.gathered else zero.deepspeed_config):
        return ZeroEngine(
            module, SETTINGS, device, zero_stage=case.zero_stage, bf16=case.bf16, micro_batch_size=8,
            accumulation_steps=case.passes,
        )  # fmt: skip


def all_gathered(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """DeepSpeed keeps whole what has fewer than 100,000 values, which here is all."""
    config = zero_config(*args, **kwargs)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def share(notations: Sequence[str], rank: int, world_size: int, passes: int) -> list[Batch]:
    """This rank's micro-batches; filler of the step's first sample where there is none."""
    mine = list(notations)[rank::world_size]
    size = -(-len(mine) // passes)
    batches = []
    for index in range(passes):
        part = mine[index * size : (index + 1) * size]
        batches.append(batch_of(part) if part else batch_of(notations[:1], num_filler=1))
    return batches


def by_loop(engine: Engine, step: int, batches: list[Batch]) -> dict[str, Any]:
    """Have the loop make one of STEPS of this rank's `batches`; what it records."""
    lines: list[dict[str, Any]] = []
    plan: Any = SimpleNamespace(steps=lambda: [(step + 1, 0, step)], num_passes=lambda _: len(batches))
    schedule: Any = SimpleNamespace(lr=lambda _: LEARNING_RATES[step])
    train(
        engine, iter(batches), plan, schedule, stage="instruct", seed=0, device=next(engine.module.parameters()).device,
        record=lambda line, _: lines.append(line),
    )  # fmt: skip
    return lines[0]


def take_step(engine: Engine, step: int, rank: int = 0, world_size: int = 1) -> None:
    """One of STEPS in one pass."""
    by_loop(engine, step, share(STEPS[step], rank, world_size, 1))


def break_step(engine: Engine, step: int, batches: list[Batch]) -> float:
    """An update whose gradients are NaN, of which the loop would end: one rank's NaN in the last pass is enough."""
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        loss = engine.forward(batch).loss
        engine.backward(loss * torch.nan if last else loss, last=last)
    return engine.update(1.0, LEARNING_RATES[step])


def run(case: Case, rank: int, world_size: int) -> Outcome:
    module = make_module(case)
    names = [name for name, _ in module.model.named_parameters(remove_duplicate=False)]
    engine, outcome = make_engine(case, module), Outcome()
    if case.evaluated:
        nll_sums(module, share(HELD_OUT, rank, world_size, 1)[0], VISUAL_GAIN)
    for step, notations in enumerate(STEPS):
        if case.skipped and step == BROKEN:
            continue
        batches = share(notations, rank, world_size, case.passes)
        outcome.num_batches += len(batches)
        if case.broken and step == BROKEN:
            outcome.before_broken = engine.gather(names)
            outcome.broken_norm = break_step(engine, step, batches)
            outcome.after_broken = engine.gather(names)
            continue
        line = by_loop(engine, step, batches)
        outcome.losses.append(line["loss"])
        outcome.weights.append(line["weight_mean"] * line["num_targets"])
        outcome.norms.append(line["grad_norm"])
        if case.evaluated:
            (batch,) = share(HELD_OUT, rank, world_size, 1)
            outcome.evaluations.append(all_sum(nll_sums(module, batch, VISUAL_GAIN)))
    outcome.final = engine.gather(names)
    return outcome


POISONED = 11
"""A token whose embedding is not finite, or has no finite gradient."""
GUILTY = 5
"""The row of the one sample that has it."""
STOPPED = (None, 2, 3)
WHATS = ("loss", "gradient", "parameters")


def poison(module: StepModule, what: str) -> None:
    """Make the number that is not finite: of one sample's loss, of one sample's gradient only, or of every sample."""
    embeddings = module.model.get_input_embeddings()
    if what == "parameters":
        with torch.no_grad():
            module.model.model.language_model.layers[0].mlp.up_proj.weight.fill_(torch.inf)
        return

    def poisoned(_: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        extra = torch.zeros_like(output)
        at = arguments[0] == POISONED
        # the root of 0 is 0, its gradient is infinite, and 0 times that is no number
        extra[at] = torch.inf if what == "loss" else (0 * output[at]).sqrt()
        return output + extra

    embeddings.register_forward_hook(poisoned)


def plain_samples(rows: Sequence[int]) -> Batch:
    """A sample with an image for each of `rows`, of which GUILTY has the token POISONED, as its third target."""
    batch = batch_of([f"s2 I t{3 + row % 3}" for row in rows])
    batch.input_ids[batch.input_ids == POISONED] = 1
    batch.input_ids[[row == GUILTY for row in rows], 8] = POISONED
    batch.labels = torch.where(batch.turn != NO_TURN, batch.input_ids, IGNORE_INDEX)
    batch.rows, batch.ids = [("0123456789abcdef", row) for row in rows], [f"id{row}" for row in rows]
    batch.places = [f"set.json#{row}" for row in rows]
    return batch


def stop(zero_stage: int | None, what: str, rank: int, world_size: int) -> str:
    """What is told of a step of eight samples in micro-batches of two, one of which is poisoned."""
    case = Case(zero_stage, passes=4 // world_size)
    module = make_module(case)
    poison(module, what)
    engine = make_engine(case, module)
    cursor = Cursor([8], seed=0, global_batch_size=8, window=8)
    plan = Plan(cursor, 1, rank, world_size, micro_batch_size=2)
    batches = (plain_samples([int(row) for row in rows]) for rows, _ in plan)
    try:
        train(
            engine, batches, plan, Schedule(1, 1e-2, 0.0), stage="instruct", seed=0, device=torch.device("cpu"),
            record=lambda line, _: None,
        )  # fmt: skip
    except UserError as err:
        return str(err)
    return "not stopped"


def work(rank: int, world_size: int, folder: str) -> None:
    """One rank of one world."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DeepSpeed calls what torch 2.13 has new names for, thousands of times
    meet = f"file://{folder}/meet-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    found = {case.name: vars(run(case, rank, world_size)) for case in cases(world_size)}
    torch.save(found, f"{folder}/{world_size}-{rank}.pt")
    stopped = {f"{stage} {what}": stop(stage, what, rank, world_size) for stage in STOPPED for what in WHATS}
    Path(folder, f"stopped-{world_size}-{rank}.json").write_text(json.dumps(stopped))
    torch.distributed.destroy_process_group()


def main(folder: str) -> int:
    """The three ranks, forked: torch, transformers and DeepSpeed are imported once. Gives 1 if one of them failed."""
    _import_deepspeed(torch.device("cpu"))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, size, folder)) for size, rank in ((2, 0), (2, 1), (1, 0))]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        time.sleep(0.1)
        if any(process.exitcode for process in ranks):  # its partner would wait for it for minutes
            for process in ranks:
                process.kill()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
