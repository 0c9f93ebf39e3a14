"""Are a plan's figures right? Compared with figures worked out by hand, for the shapes of Llama-3.1-8B and CLIP-L, and with
what torch itself counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpa_ray.data.cursor import Cursor, shares
from dpa_ray.doctor.plan import arguments, command, control, estimate, options, timing
from dpa_ray.doctor.plan.facts import Facts, measured
from dpa_ray.doctor.plan.options import Given, PlanOptions
from dpa_ray.doctor.plan.reading import amplification, rows_per_group
from dpa_ray.doctor.plan.work import Model, Work, exchanged_bytes
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe, parse
from dpa_ray.report.metrics import MetricsLog
from dpa_ray.stages.runs import Run
from dpa_ray.store.fs import Store

MODEL = Model(
    llm=8_030_261_248, lookup=525_336_576, tower=303_507_456, connector=20_979_712, num_layers=32,
    attention_width=4096, num_image_tokens=576,
)  # fmt: skip
INSTRUCT = Work(
    stage="instruct", llm_mode="full", num_samples=665_000, epochs=1, max_steps=None, global_batch_size=256,
    tokens=1000, text_tokens=424, bytes_per_sample=100_000, trained=8_051_240_960, lora=0, with_images=True,
    blind="none", model=MODEL,
)  # fmt: skip
CONNECTOR = replace(
    INSTRUCT, stage="proxy_mllm", llm_mode="frozen", num_samples=1_200_000, trained=MODEL.connector, blind="cached"
)
LAYOUT = timing.Layout(zero_stage=2, item=2, micro_batch_size=4, gpus_per_worker=1)
OPTIONS = PlanOptions(gpus=(8, 64), peak_flops=1e15, mfu=0.4)
COSTS = control.Costs(board_call_s=1e-3, poll_s=1e-4, gcs_task_s=1e-5, origin="of this test")


def recipe(**changes: Any) -> Recipe:
    values = {
        "name": "planned", "store": "s3://bucket/dpa",
        "model": {"llm": "builtin:tiny-llm", "vision": "builtin:tiny-vit"},
        "data": {"pretrain": {"source": "builtin:shapes"}, "instruct": {"source": "builtin:shapes"}},
        "stages": {"instruct": {"micro_batch_size": 4}},
        "cluster": {"workers": 8, "gpus_per_worker": 1},
    }  # fmt: skip
    return parse({**values, **changes})


# -- work


def test_flops_are_those_worked_out_by_hand() -> None:
    """6 of 7,504,924,672 for each of 1,000 tokens; causal attention of 32 layers x 4096, three times its forward; 576
    features through the tower forward, and through the connector forward and backward."""
    by_hand = 6 * 7_504_924_672 * 1000 + 3 * 2 * 32 * 4096 * 1000**2 + 576 * (2 * 303_507_456 + 6 * 20_979_712)
    assert INSTRUCT.flops_per_sample == by_hand == 46_238_126_505_984
    assert INSTRUCT.blind_flops_per_sample == 2 * 7_504_924_672 * 424 + 2 * 32 * 4096 * 424**2
    frozen = replace(INSTRUCT, llm_mode="frozen").flops_per_sample
    assert INSTRUCT.flops_per_sample - frozen == 2 * 7_504_924_672 * 1000, "no gradients of the LLM's weights"
    live = replace(INSTRUCT, blind="live").flops_per_sample
    assert live - INSTRUCT.flops_per_sample == INSTRUCT.blind_flops_per_sample


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_flops_are_those_that_torch_counts(mode: str, tiny_llm: Callable[..., Path]) -> None:
    """torch computes the whole square of attention's scores, of which the model needs half."""
    llm: Any = AutoModelForCausalLM.from_pretrained(tiny_llm("llama", bos=True), attn_implementation="eager")
    config, num_tokens = llm.config, 48
    embedding = llm.get_input_embeddings().weight
    tied = embedding is llm.get_output_embeddings().weight
    llm.requires_grad_(mode == "full")
    inputs = llm.get_input_embeddings()(torch.arange(num_tokens)[None] % 16).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        llm(inputs_embeds=inputs).logits.sum().backward()
    model = Model(
        llm=sum(p.numel() for p in llm.parameters()), lookup=0 if tied else embedding.numel(), tower=0, connector=0,
        num_layers=config.num_hidden_layers, attention_width=config.num_attention_heads * llm.model.layers[0].self_attn.head_dim,
        num_image_tokens=0,
    )  # fmt: skip
    work = replace(INSTRUCT, model=model, llm_mode=mode, tokens=num_tokens, with_images=False)
    half = 3 * 2 * model.num_layers * model.attention_width * num_tokens**2
    # the weights of norms are parameters, and not multiplied with as matrices are
    assert work.flops_per_sample + half == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_steps_and_samples_of_a_stage() -> None:
    assert INSTRUCT.num_steps == 2598, "665,000 / 256 = 2,597.7"
    assert INSTRUCT.num_taken == 665_000
    assert replace(INSTRUCT, epochs=2).num_taken == 1_330_000
    assert replace(INSTRUCT, epochs=2, max_steps=2600).num_taken == 665_000 + 2 * 256
    assert replace(INSTRUCT, max_steps=10).num_taken == 2560


def test_what_crosses_the_network() -> None:
    of = {"item": 2, "num_workers": 64, "num_passes": 3}
    assert exchanged_bytes(INSTRUCT, zero_stage=2, **of) == 63 / 64 * 2 * 2 * 8_051_240_960
    whole = MODEL.llm + MODEL.tower + MODEL.connector
    assert exchanged_bytes(INSTRUCT, zero_stage=3, **of) == 63 / 64 * 2 * (2 * 3 * whole + 8_051_240_960)
    assert exchanged_bytes(INSTRUCT, zero_stage=2, item=2, num_workers=1, num_passes=1) == 0


# -- time


def test_a_measured_step_is_carried_to_other_numbers_of_gpus() -> None:
    """40 s on 8 GPUs of one node: 32 samples each, 1.25 s a sample. On 64: 4 samples, 5 s, and 31.7 GB at 50 GB/s."""
    speed = timing.from_measured(INSTRUCT, LAYOUT, Given(40, 8), 256, OPTIONS, "")
    assert speed.sample_s == 1.25
    network = 63 / 64 * 4 * 8_051_240_960 / 50e9
    assert network == pytest.approx(0.634, abs=1e-3)
    assert timing.step_s(INSTRUCT, LAYOUT, speed, 256, 64, OPTIONS) == pytest.approx(4 * 1.25 + network)
    assert timing.step_s(INSTRUCT, LAYOUT, speed, 256, 1, OPTIONS) == 256 * 1.25
    back = timing.from_measured(INSTRUCT, LAYOUT, Given(5 + network, 64), 256, OPTIONS, "")
    assert back.sample_s == pytest.approx(1.25)


def test_more_gpus_than_samples_help_no_further() -> None:
    speed = timing.Speed(1.0, "")
    free = replace(OPTIONS, network_bytes_per_s=1e30)
    assert timing.step_s(INSTRUCT, LAYOUT, speed, 256, 1024, free) == pytest.approx(1.0)


def test_a_step_that_is_shorter_than_its_exchange_is_refused() -> None:
    with pytest.raises(UserError, match=r"instruct: expected a step of more than 0\.634 s on 64 GPUs.*found 0\.5 s"):
        timing.from_measured(INSTRUCT, LAYOUT, Given(0.5, 64), 256, OPTIONS, "")


def test_time_from_flops_and_q_at_the_same_rate() -> None:
    speed = timing.from_flops(INSTRUCT, LAYOUT, OPTIONS)
    assert speed.sample_s == pytest.approx(46_238_126_505_984 / 4e14)
    q = timing.blind_s(CONNECTOR, timing.from_flops(CONNECTOR, LAYOUT, OPTIONS), 8)
    assert q == pytest.approx(1_200_000 * CONNECTOR.blind_flops_per_sample / 4e14 / 8)


# -- bytes


def test_one_reader_reads_each_byte_once_and_many_read_what_they_share() -> None:
    """64 samples of one row group dealt to 64 processes: each reads the group."""
    of = {"window": 65_536, "micro_batch_size": 1}
    assert rows_per_group(100_000) == 5, "512 KiB / 100,000"
    assert rows_per_group(1_000) == 64
    assert amplification(64, 1_000, batch=64, num_workers=64, tasks_per_worker=1, **of) == 64
    assert amplification(64, 1_000, batch=64, num_workers=1, tasks_per_worker=1, **of) == 1
    assert amplification(64, 1_000, batch=32, num_workers=8, tasks_per_worker=2, **of) == 16, "both tasks of each"


def test_reads_are_those_of_the_real_order() -> None:
    """Counted anew from the cursor's and `shares`' own answers; no cache is full."""
    cursor = Cursor([64] * 32, seed=0, global_batch_size=96, window=512)
    seen: set[tuple[int, int, int]] = set()
    for step in range(cursor.steps_per_epoch):
        layout = shares(cursor.rows(0, step), 6, 4)
        for worker, passes in enumerate(layout):
            for number, rows in enumerate(passes):
                seen |= {(worker, (step * len(passes) + number) % 2, int(row) // 64) for row in rows}
    found = amplification(2048, 1_000, window=2048, batch=96, micro_batch_size=4, num_workers=6, tasks_per_worker=2)
    whole = Cursor([64] * 32, seed=0, global_batch_size=96, window=2048)
    again: set[tuple[int, int, int]] = set()
    for step in range(whole.steps_per_epoch):
        for worker, passes in enumerate(shares(whole.rows(0, step), 6, 4)):
            for number, rows in enumerate(passes):
                again |= {(worker, (step * len(passes) + number) % 2, int(row) // 64) for row in rows}
    assert found == len(again) / 32
    assert len(seen) <= len(again), "a small window lets fewer processes share a group"


def planner(**changes: Any) -> estimate.Planner:
    facts = Facts({"proxy_mllm": CONNECTOR, "instruct": INSTRUCT}, {}, None, image_side=336, shards_to_make=0.0)
    given = {"proxy_mllm": Given(20, 8), "instruct": Given(40, 8)}
    return estimate.Planner(recipe(**changes), facts, replace(OPTIONS, step_times=given), COSTS)


def test_a_run_on_so_many_gpus_is_the_sum_of_its_parts() -> None:
    made = planner().whole(8)
    rows = {row.part: row for row in made.rows}
    assert list(rows) == ["merge", "q of proxy_mllm", "proxy_mllm", "instruct"]
    instruct = rows["instruct"]
    assert (instruct.num_steps, instruct.step_time_s, instruct.time_s) == (2598, 40, 2598 * 40)
    # every 300 s: 346 of 12 bytes a trained parameter; bf16 weights twice, as S3 has no links
    assert instruct.written["checkpoints"] == 346 * 12 * 8_051_240_960
    weights = 2 * (8_030_261_248 + 303_507_456 + 20_979_712)
    assert instruct.written["artifact"] == instruct.written["model"] == weights
    assert rows["merge"].written == {"proxy-merged": 2 * 8_030_261_248}
    assert rows["q of proxy_mllm"].written == {"q": 1_200_000 * 424 * 8}
    assert rows["proxy_mllm"].read["base weights"] == 2 * (8_030_261_248 + 303_507_456), "one node of 8"
    steps = 4688 * 20.0
    assert made.to_dict()["total"]["time_s"] == pytest.approx(steps + 2598 * 40 + rows["q of proxy_mllm"].time_s)
    assert made.to_dict()["total"]["gpu_hours"] == pytest.approx(made.time_s / 3600 * 8)
    many = {row.part: row for row in planner().whole(64).rows}
    assert many["proxy_mllm"].read["base weights"] == 8 * rows["proxy_mllm"].read["base weights"], "eight nodes"


def test_a_growing_batch_asks_the_store_in_proportion() -> None:
    one, many = (planner().scaled("instruct", num) for num in (8, 64))
    assert (one.batch, many.batch) == (256, 2048)
    assert one.samples_per_s == pytest.approx(256 / 40)
    assert one.data_bytes_per_s == pytest.approx(256 / 40 * 100_000 * one.reads_of_a_byte)
    assert one.checkpoint_bytes_per_s == pytest.approx(12 * 8_051_240_960 / 300)
    assert one.store_share == pytest.approx((one.data_bytes_per_s + one.checkpoint_bytes_per_s) / 25e9)
    assert many.step_time_s > one.step_time_s, "the network"
    assert many.start_bytes == 8 * 2 * (8_030_261_248 + 303_507_456)


# -- driver and head


def test_where_driver_and_head_become_the_limit() -> None:
    """A sign of life every 10 s costs the board 1 ms; one worker of a round 0.1 ms of 1 s; a task the GCS 10 us; a note
    30 ms of 300 s."""

    def load(n: int) -> control.Load:
        return control.Load(0.5, 2.0, 600, 300, 0.03)

    found = {limit.who: limit for limit in control.limits(load, COSTS, 1000)}
    assert found["driver"].share == pytest.approx(1e-3 * (1000 / 10 + 0.5))
    assert found["driver"].at_workers == 9995, "1e-3 * (n / 10 + 0.5) = 1"
    assert (found["controller"].share, found["controller"].at_workers) == (pytest.approx(0.1), 10_000)
    assert (found["head"].share, found["head"].at_workers) == (pytest.approx(0.02), 50_000)
    assert (found["rank 0"].share, found["rank 0"].at_workers) == (pytest.approx(0.1), 10_000)


def test_what_never_becomes_a_limit_says_so() -> None:
    nothing = control.Costs(0.0, 0.0, 0.0, "")
    found = control.limits(lambda n: control.Load(0.0, 0.0, 600, 300, 0.0), nothing, 8)
    assert {limit.at_workers for limit in found} == {None}


# -- the command


@pytest.mark.parametrize(
    ("text", "expected"), [("1,8,64", (1, 8, 64)), ("8,1", (1, 8)), ("1-8", (1, 2, 4, 8)), ("2-12", (2, 4, 8, 12))]
)
def test_numbers_of_gpus(text: str, expected: tuple[int, ...]) -> None:
    assert options.gpu_list(text) == expected


@pytest.mark.parametrize("text", ["", "0", "8-1", "a", "1-", "1,,2", "99999999"])
def test_wrong_numbers_of_gpus_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--gpus: expected"):
        options.gpu_list(text)


def test_step_times_say_on_how_many_gpus() -> None:
    stages = ("proxy_llm", "instruct")
    assert options.step_times(["2.5@8", "instruct=4@16"], stages) == {
        "proxy_llm": Given(2.5, 8),
        "instruct": Given(4, 16),
    }
    for wrong in ("2.5", "instruct=2@0", "other=2@8", "instruct=x@8", "instruct=2@"):
        with pytest.raises(ValueError, match="--step-time: .*expect"):
            options.step_times([wrong], stages)


def plan(capsys: pytest.CaptureFixture[str], made: Recipe, *told: str) -> str:
    stages = ("proxy_llm", "proxy_mllm", "instruct")
    given = arguments.read(parsed(*told), stages)
    command.run(made, stages, given, measure=False, as_json=False)
    return capsys.readouterr().out


def parsed(*told: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("--step-time", "--samples"):
        parser.add_argument(name, action="append", default=[])
    arguments.add_arguments(parser)
    return parser.parse_args([*told])


def test_a_plans_defaults_are_those_that_its_help_tells() -> None:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for default in ("1-1024", "0.4", "8", "50", "25", "30"):
        assert f"(default: {default})" in text
    given = arguments.read(parsed(), ())
    assert given == options.PlanOptions(options.gpu_list(options.DEFAULT_GPUS))
    told = ["--mfu", "0.5", "--network-gbyte-s", "1", "--store-latency-ms", "7", "--gpus-per-node", "4", "--from", "r"]
    given = arguments.read(parsed(*told, "--gpus", "2"), ())
    assert (given.gpus, given.mfu, given.network_bytes_per_s, given.store_latency_s) == ((2,), 0.5, 1e9, 0.007)
    assert (given.gpus_per_node, given.from_run, given.store_bytes_per_s) == (4, "r", 25e9)


@pytest.mark.parametrize("told", [["--gpus", "1-1024"], ["--from", "x"], ["--mfu", "0.4"], ["--measure"]])
def test_what_only_a_plan_reads_is_refused_without_one(told: list[str]) -> None:
    with pytest.raises(ValueError, match=f"expected --plan beside {told[0]}, which only a plan reads"):
        arguments.refuse_without_plan(parsed(*told))
    arguments.refuse_without_plan(parsed("--plan", *told))
    arguments.refuse_without_plan(parsed("--samples", "2"))


def test_each_of_a_plans_arguments_is_refused_without_it() -> None:
    """But those that the doctor reads too."""
    parser = argparse.ArgumentParser(add_help=False)
    arguments.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags - {"--plan"} == set(arguments.PLAN_ONLY)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (["--mfu", "80GB"], "expected a number > 0, without a unit, found '80GB'"),
        (["--mfu", "-1"], "expected a number > 0, without a unit, found '-1'"),
        (["--gpus-per-node", "1.5"], "expected a whole number > 0, found '1.5'"),
    ],
)
def test_a_wrong_number_is_told_as_what_was_expected(
    told: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*told)
    assert text in capsys.readouterr().err


def test_a_plan_of_a_recipe_whose_data_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(
        store=str(tmp_path / "store"),
        data={"pretrain": {"source": str(tmp_path / "no.json")}, "instruct": {"source": str(tmp_path / "no.json")}},
    )
    with pytest.raises(UserError, match="proxy_llm: the number of samples is not known.*give --samples proxy_llm=N"):
        plan(capsys, made, "--gpu", "H100")
    sizes = [
        "--samples",
        "1000",
        "--samples",
        "instruct=2000",
        "--bytes-per-sample",
        "50000",
        "--tokens-per-sample",
        "600",
    ]
    with pytest.raises(UserError, match="proxy_llm: expected a step time, found none; give --step-time"):
        plan(capsys, made, *sizes)
    out = plan(capsys, made, *sizes, "--step-time", "3@8", "--gpus", "1,1024")
    assert "instruct: 2,000 samples (given) of 600 tokens (given) and 50,000 bytes in the shards" in out
    assert "3 s a step on 8 GPUs (given)" in out
    assert not (tmp_path / "store").exists(), "a plan writes nothing"


def test_a_plan_takes_the_steps_of_a_run(tmp_path: Path) -> None:
    made = recipe(store=str(tmp_path), name="before", cluster={"workers": 8, "gpus_per_worker": 1})
    store = Store(str(tmp_path))
    run = Run(store, made)
    run.write("done")
    log = MetricsLog(store, run.path)
    log.start("instruct")
    for step in range(1, 8):
        time_s = 50.0 if step <= 3 else 2.0  # the first ones warm up
        log.append(
            {"stage": "instruct", "step": step, "num_samples": 256, "num_tokens": 256 * 700, "num_targets": 256 * 90,
             "step_time_s": time_s, "data_wait_s": 0.5}
        )  # fmt: skip
    log.flush()
    _, found = measured(str(tmp_path / "runs" / "before"))
    assert found["instruct"].step == Given(2.0, 8)
    assert (found["instruct"].batch, found["instruct"].tokens, found["instruct"].targets) == (256, 700, 90)
    assert found["instruct"].wait_fraction == 0.25


def test_the_whole_is_plain_json(tmp_path: Path) -> None:
    made = estimate.Plan("x", planner().assumptions(), [planner().whole(8)], [planner().scaled("instruct", 8)])
    again = json.loads(json.dumps(made.to_dict()))
    assert again["gpus"][0]["num_gpus"] == 8
    assert {"read_bytes", "written_bytes", "gpu_hours", "hours"} <= set(again["gpus"][0]["total"])
    assert again["scaling"][0]["limits"][0]["who"] == "driver"
