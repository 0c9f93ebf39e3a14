"""Is the doctor's estimate of memory what the engines really hold, and what autograd really keeps?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpa_ray.batch import Batch
from dpa_ray.doctor import memory
from dpa_ray.doctor.activations import FUSED, Kept, count_kept
from dpa_ray.doctor.memory import Counts, Pictures, estimate
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.model import lora
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.step import StepModule
from dpa_ray.stages.trainable import select_trainable
from tests.engine_worker import SETTINGS, Case
from tests.memory_worker import cases, measure
from tests.random_models import batch_of, make_llm, make_vlm

ROOT = Path(__file__).resolve().parents[2]
SLACK = 0.001
"""Of the bytes held: optimizers' step counters, and sums of the step."""


def expected(case: Case, found: dict[str, int]) -> int:
    """Between steps; ZeRO 3 also keeps its part of the gradients, and the bucket in which they are reduced."""
    return found["state_bytes"] + (found["gradients_bytes"] + found["buckets_bytes"] if case.zero_stage == 3 else 0)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_and_optimizer_state_are_the_bytes_that_the_plain_engine_holds(bf16: bool) -> None:
    found = measure(Case(None, bf16), 0, 1)
    assert found["held"] == pytest.approx(expected(Case(None, bf16), found), rel=SLACK)
    per_trained = (2 + 4 if bf16 else 4) + 8  # weights (and masters), both moments
    assert found["held"] > per_trained * found["trained"]


@pytest.mark.ci
def test_every_zero_stage_holds_what_is_estimated_on_one_rank_and_on_two(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tests.memory_worker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for world in ("1-0", "2-0", "2-1"):
        found = json.loads((tmp_path / f"{world}.json").read_text())
        for case in cases():
            values = found[case.name]
            assert values["held"] == pytest.approx(expected(case, values), rel=SLACK), (world, case)


@pytest.mark.parametrize("trained", ["full", "frozen", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_decoder_on_the_meta_device_keeps_what_a_real_one_keeps(family: str, trained: str) -> None:
    real = make_llm(family, attention="eager")
    with torch.device("meta"):
        config_only = AutoModelForCausalLM.from_config(real.config, attn_implementation="eager")
    found = []
    for llm in (real, config_only):
        if trained == "lora":
            with torch.device(llm.device):
                lora.attach(llm, rank=2, alpha=4, dropout=0.0, seed=0)
        else:
            llm.requires_grad_(trained == "full")
        found.append(count_kept(llm.base_model, 3, 20, inputs_train=True))
    assert found[0] == found[1]
    assert found[0].whole > 2 * found[0].layer - 2 > 0
    assert found[0].checkpointed < found[0].whole


def test_fused_attention_keeps_no_square_of_the_length() -> None:
    """Twice the positions: twice the bytes, where eager attention keeps more than that."""
    kept = {}
    for attention in ("sdpa", "eager"):
        with torch.device("meta"):
            llm: Any = AutoModelForCausalLM.from_config(make_llm("llama").config, attn_implementation=attention)
        kept[attention] = [count_kept(llm.base_model, 2, n, inputs_train=True).whole for n in (64, 128)]
        assert llm.config._attn_implementation == attention != FUSED
    assert kept["sdpa"][1] == pytest.approx(2 * kept["sdpa"][0], rel=0.01)
    assert kept["eager"][1] > 2.5 * kept["eager"][0]


def measured_peak(engine: PlainEngine, batch: Batch) -> int:
    """Bytes that one forward and backward take at once, beyond what was there, as torch's profiler saw them come and go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        sums = engine.forward(batch)
        engine.backward(sums.loss / batch.num_targets, last=True)
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.ci
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["full", "connector"])
def test_a_step_takes_no_more_than_is_estimated(trained: str, checkpointing: bool) -> None:
    """And not much less. The first pass has no sum of gradients yet, and with checkpointing a whole layer's size is set
    aside for gradients under way: the estimate may be higher by that."""
    model = make_vlm(
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, vocab_size=4000, max_position_embeddings=1024
    )
    select_trainable(model, *{"full": ("instruct", "full"), "connector": ("proxy_mllm", "frozen")}[trained])
    batch = batch_of(["s1 I t256"] * 8)
    num_rows, num_positions = batch.input_ids.shape
    kept = count_kept(model.model.language_model, num_rows, num_positions, inputs_train=True)
    found = estimate(
        memory.count(model, model.get_output_embeddings()), zero_stage=None, world_size=1, bf16=False,
        num_slots=batch.input_ids.numel(), num_targets=batch.num_targets,
        kept=memory.kept_bytes(kept, checkpointing=checkpointing), on_gpu=False,
    )  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = StepModule(model, Weighting("uniform", 1.0, 1.0, 1), softcap=None, num_softmax_rows=None).train()
    peak = measured_peak(PlainEngine(module, SETTINGS, torch.device("cpu")), batch)
    expected = found.activations + found.loss + found.gradients
    assert 0.95 * peak < expected < (2.5 if checkpointing else 1.35) * peak


def counts(**changes: Any) -> Counts:
    return Counts(**{"frozen": 2_000_000, "trained": 8_000_000_000, "small": 0, "width": 4096, "num_rows": 128_256,
                     "head_is_trained": True, **changes})  # fmt: skip


def of(zero_stage: int | None, world_size: int = 8, **changes: Any) -> memory.Estimate:
    options: dict[str, Any] = dict(bf16=True, num_slots=0, num_targets=0, kept=0)
    return estimate(counts(), zero_stage=zero_stage, world_size=world_size, **{**options, **changes})


def test_an_8b_model_by_hand() -> None:
    """bf16 on 8 ranks: 2 bytes a weight; 4 + 8 of masters and moments, and of gradients 2, shared out 4, by the stage."""
    whole, part = 8_000_000_000, 1_000_000_000
    assert [of(stage).weights for stage in (0, 1, 2)] == [2 * (whole + 2_000_000)] * 3
    assert of(3).weights == 2 * (part + 250_000)
    assert [of(stage).masters + of(stage).moments for stage in (0, 1, 2, 3)] == [
        12 * whole,
        12 * part,
        12 * part,
        12 * part,
    ]
    assert [of(stage).gradients for stage in (0, 1, 2, 3)] == [2 * whole, 2 * whole, 4 * part, 4 * part]
    assert of(3).start == 2 * (whole + 2_000_000) + 2 * (part + 250_000), "the whole model, and its part"


def test_totals_fall_with_the_stage_and_with_the_ranks() -> None:
    totals = [of(stage).total for stage in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert of(2, world_size=16).total < of(2, world_size=8).total
    assert of(0, world_size=16).total == of(0, world_size=8).total


def test_the_loss_takes_a_chunk_and_a_trained_heads_gradient_whatever_the_targets() -> None:
    few, many = of(2, num_targets=1000).loss, of(2, num_targets=4000).loss
    assert many - few == 2 * 3000 * 4096 * 2, "only hidden states grow"
    frozen = estimate(
        counts(head_is_trained=False), zero_stage=2, world_size=8, bf16=True, num_slots=0, num_targets=4000, kept=0
    )
    assert many - frozen.loss == 6 * 128_256 * 4096


def test_the_update_is_the_worst_moment_where_a_step_needs_less() -> None:
    """ZeRO 0 of 8 billion: weights, gradients, masters and moments, and an exact gradient of 4 bytes at the update."""
    found, whole = of(0), 8_000_000_000
    state = 2 * (whole + 2_000_000) + (4 + 8) * whole
    assert (found.activations, found.loss, found.update) == (0, 0, 4 * whole)
    assert found.total == state + 2 * whole + 4 * whole + memory.CUDA_BYTES
    longer = of(0, kept=5 * whole)
    assert longer.total == state + 2 * whole + 5 * whole + memory.CUDA_BYTES


def test_the_loss_by_hand() -> None:
    """Two chunks (logits, and what is made of them), hidden states with their gradient; where there are several chunks, a
    sum of 4 bytes and a gradient of 2 of the head."""
    hidden, head = 2 * 1000 * 4096 * 2, (4 + 2) * 128_256 * 4096
    assert of(2, num_targets=1000, on_gpu=True).loss == 2 * 256 * 2**20 + hidden + head
    assert of(2, num_targets=1000, on_gpu=False).loss == 2 * 4 * 2**20 + hidden + head
    assert of(2, num_targets=10).loss == 2 * 4 * 10 * 128_256 + 2 * 10 * 4096 * 2, "one chunk, not a whole one"


def test_small_tensors_are_whole_on_every_rank_at_zero_three() -> None:
    options: dict[str, Any] = dict(world_size=8, bf16=True, num_slots=0, num_targets=0, kept=0)
    few, many = (
        [estimate(counts(small=small), zero_stage=stage, **options).weights for stage in (0, 1, 2, 3)]
        for small in (0, 10**6)
    )
    assert [b - a for a, b in zip(few, many, strict=True)] == [0, 0, 0, 2 * 10**6]


def test_a_layer_that_is_computed_again_is_there_beside_its_gradients() -> None:
    kept = Kept(whole=100, checkpointed=30, layer=7)
    assert memory.kept_bytes(kept, checkpointing=False) == 100
    assert memory.kept_bytes(kept, checkpointing=True) == 30 + 7


def test_images_count_each() -> None:
    pictures = Pictures(24, 1024, 576, 336)
    one, two = (of(2, pictures=pictures, num_images=n).activations for n in (1, 2))
    assert two == 2 * one > 25 * 577 * 1024 * 2, "all hidden states of the tower are given back"
