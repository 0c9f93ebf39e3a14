"""Is training that goes wrong told, once a stage, with what was seen and what to do, also after a run went on?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Batch
from dpa_ray.data.cursor import Cursor
from dpa_ray.engine.job import View
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model import lora
from dpa_ray.recipe import Recipe
from dpa_ray.report.goodput import Ledger
from dpa_ray.report.watch import Watch
from dpa_ray.stages.runs import Run
from dpa_ray.store import Store
from tests.random_models import batch_of, make_llm, make_step

Records = list[dict[str, Any]]


def records(stage: str, num: int = 400, *, seed: int = 0, **series: Callable[[float], float]) -> Records:
    """`num` steps whose keys are functions of the part of the stage that is done, with noise of 2 %."""
    rng = np.random.default_rng(seed)
    return [
        {"stage": stage, "step": step, "grad_norm": 1.0 + 0.1 * rng.random()}
        | {key: f((step - 1) / num) * (1 + 0.02 * rng.normal()) for key, f in series.items()}
        for step in range(1, num + 1)
    ]


def falls(t: float) -> float:
    return 2 + 2 * np.exp(-8 * t)


def rises(t: float) -> float:
    return falls(t) + max(0.0, t - 0.4)


def bounces(t: float) -> float:
    """At the end up and down at every step."""
    return falls(t) + (t > 0.5) * 0.5 * (-1) ** round(400 * t)


def told(watch: Watch, lines: Iterable[dict[str, Any]]) -> Records:
    return [warned for line in lines for warned in watch.step(line)]


def test_stage_one_that_rises_is_told_once(recipe: Callable[..., Recipe]) -> None:
    watch = Watch(recipe("stages.proxy_llm.lr=0.5"))
    (warned,) = told(watch, records("proxy_llm", loss=rises))
    assert (warned["stage"], warned["kind"]) == ("proxy_llm", "rise")
    assert 160 < warned["step"] < 320
    assert warned["text"].startswith(f"proxy_llm, step {warned['step']}: the loss rises: about 2.")
    assert "lower stages.proxy_llm.lr (0.5) or stages.proxy_llm.lora.rank (256)" in warned["text"]
    assert watch.warnings == [warned]


def test_stage_one_that_bounces_is_told_so(recipe: Callable[..., Recipe]) -> None:
    (warned,) = told(Watch(recipe()), records("proxy_llm", loss=bounces))
    assert "the loss bounces: about" in warned["text"]


@pytest.mark.parametrize("stage", ["proxy_llm", "proxy_mllm", "instruct"])
def test_a_stage_that_goes_well_is_not_told(stage: str, recipe: Callable[..., Recipe]) -> None:
    fine = records(
        stage, loss=falls, nll_mean=falls, nll_mean_visual=falls, nll_mean_style=falls, weight_mean=lambda t: 0.2
    )
    assert told(Watch(recipe()), fine) == []


def test_a_rise_is_no_sign_in_stages_two_and_three(recipe: Callable[..., Recipe]) -> None:
    """Stage 2's loss depends on what the proxy knows of its captions; stage 3's rise must be that of the visual words."""
    for stage in ("proxy_mllm", "instruct"):
        assert told(Watch(recipe("method=vanilla")), records(stage, loss=rises, nll_mean=rises)) == []


def test_visual_words_up_and_style_down_is_told(recipe: Callable[..., Recipe]) -> None:
    lines = records("instruct", loss=falls, nll_mean_visual=rises, nll_mean_style=lambda t: 2 - t)
    (warned,) = told(Watch(recipe("method=vanilla")), lines)
    assert warned["kind"] == "style"
    assert "the loss of the words that the image shows rises" in warned["text"]
    assert "while that of the others falls (" in warned["text"]
    assert "set stages.instruct.weights=prob" in warned["text"]
    (warned,) = told(Watch(recipe()), lines)
    assert "lower cmo.lower (0.05) or stages.instruct.lr (4e-05)" in warned["text"]


@pytest.mark.parametrize("style", [lambda t: 2.0, rises], ids=["stays", "rises"])
def test_visual_words_up_alone_are_another_matter(style: Callable, recipe: Callable[..., Recipe]) -> None:
    """Where all rises, or the rest stays, it is not the style that is learnt."""
    lines = records("instruct", loss=falls, nll_mean_visual=rises, nll_mean_style=style)
    assert told(Watch(recipe()), lines) == []


def test_where_no_words_are_known_the_weights_split_them(recipe: Callable[..., Recipe]) -> None:
    """Two kinds of tokens of weights 0.5 and 0.05, a fifth of the first: the sums give back what each kind does."""

    def lines(visual: Callable[[float], float], style: Callable[[float], float]) -> Records:
        made = records("instruct", visual=visual, style=style)
        for line in made:
            v, s = line.pop("visual"), line.pop("style")
            line["weight_mean"] = 0.2 * 0.5 + 0.8 * 0.05
            line["nll_mean"] = 0.2 * v + 0.8 * s
            line["loss"] = (0.2 * 0.5 * v + 0.8 * 0.05 * s) / line["weight_mean"]
        return made

    (warned,) = told(Watch(recipe()), lines(lambda t: 3 * rises(t), lambda t: 2 - t))
    assert "the loss of the tokens, weighted by what the image helps with them, rises" in warned["text"]
    assert told(Watch(recipe()), lines(falls, lambda t: 2 - t)) == []
    watch = Watch(recipe())
    line = lines(falls, falls)[0]
    parts = watch._parts(line)
    assert parts is not None
    assert parts[1] == pytest.approx(
        (line["nll_mean"] - 0.2 * (parts[0] * line["weight_mean"] - 0) / 0.1) / 0.8, rel=0.3
    )


@pytest.mark.parametrize(("key", "size", "text"), [
    ("loss", 9.0, "the loss is 9, after "), ("grad_norm", 90.0, "the gradient's norm is 90, after 1."),
])  # fmt: skip
def test_one_step_far_above_the_others_is_told(key: str, size: float, text: str, recipe: Callable[..., Recipe]) -> None:
    lines = records("proxy_mllm", 120, loss=falls)
    lines[100][key] = lines[110][key] = size
    lines[20][key] = size / 10
    (warned,) = told(Watch(recipe()), lines)
    assert (warned["kind"], warned["step"]) == ("spike", 101)
    assert text in warned["text"]
    assert "in 50 steps. The run goes on (gradients are clipped to 1)" in warned["text"]


# -- across a resume


@pytest.mark.parametrize("killed_after", [10, 150, 200, 399])
def test_a_stage_that_goes_on_is_told_what_it_would_have_been_told(
    killed_after: int, recipe: Callable[..., Recipe]
) -> None:
    """Once, at the same step: by the same driver, whose workers came back four steps earlier, and by another one."""
    lines = records("proxy_llm", loss=rises)
    expected = told(Watch(recipe()), lines)
    again = killed_after - 4
    same = Watch(recipe())
    assert told(same, lines[:killed_after]) + told(same, lines[again:]) == expected
    first = Watch(recipe())
    before = told(first, lines[:killed_after])
    second = Watch(recipe(), json.loads(json.dumps(first.warnings)), lambda stage: lines[:again])
    assert before + told(second, lines[again:]) == expected
    assert second.warnings == expected


def test_a_stage_that_begins_anew_forgets_its_own_warnings_only(recipe: Callable[..., Recipe]) -> None:
    old = [{"stage": stage, "kind": "rise", "step": 9, "text": "old"} for stage in ("proxy_llm", "instruct")]
    watch = Watch(recipe(), old)
    told(watch, records("instruct", 20, loss=falls))
    assert [warned["stage"] for warned in watch.warnings] == ["proxy_llm"]


def test_warnings_are_on_the_screen_and_in_run_json_and_stay_there(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    store, notes = Store(made.store), []
    progress: Any = SimpleNamespace(step=lambda values: None, note=notes.append)
    run = Run(store, made)
    run.write("running")
    view = View(progress, made, run, Ledger(0.0), lambda: run.write("running"))
    for line in records("proxy_llm", loss=rises):
        view.handle("step", {**line, "saving_s": 0.0, "step_time_s": 1.0, "data_wait_s": 0.0}, line["step"])
    (note,) = notes
    assert note.startswith("warning: proxy_llm, step ")
    (warned,) = store.read_json("runs/small/run.json")["warnings"]
    assert note == f"warning: {warned['text']}"
    run.write("failed", error="x")
    again = Run(store, made)
    again.check_name()
    again.write("running")
    assert store.read_json("runs/small/run.json")["warnings"] == [warned]


# -- what real training does


def train_for_real(*, full: bool, lr: float, warmup_fraction: float) -> list[dict[str, Any]]:
    """300 steps of eight noisy countings by a random LLM, in full or by a LoRA, without clipping; the metrics."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 12) + rng.integers(1, 4) * np.arange(rng.integers(6, 16))) % 12 for _ in range(512)]
    rows = [np.where(rng.random(len(row)) < 0.85, row, rng.integers(0, 12, len(row))) for row in rows]
    llm = make_llm("llama", seed=1)
    if not full:
        lora.attach(llm, rank=8, alpha=16, dropout=0.0, seed=3)
    settings = OptimizerSettings((0.9, 0.999), 0.0, grad_clip=0.0)
    engine = PlainEngine(make_step(llm, "uniform").train(), settings, torch.device("cpu"))
    plan = Plan(Cursor([len(rows)], seed=0, global_batch_size=8, window=1000), 300, 0, 1, micro_batch_size=8)

    def batch(taken: np.ndarray) -> Batch:
        made = batch_of([f"s1 t{len(rows[row]) - 1}" for row in taken])
        for i, row in enumerate(taken):
            made.input_ids[i, : len(rows[row])] = torch.from_numpy(rows[row])
        made.labels = torch.where(made.turn != NO_TURN, made.input_ids, IGNORE_INDEX)
        return made

    lines: list[dict[str, Any]] = []
    train(
        engine, (batch(taken) for taken, _ in plan), plan, Schedule(300, lr, warmup_fraction), stage="proxy_llm", seed=0,
        device=torch.device("cpu"), record=lambda line, _: lines.append(line),
    )  # fmt: skip
    return lines


@pytest.mark.ci
@pytest.mark.parametrize(
    ("full", "lr", "warmup_fraction", "expected"),
    [(False, 5e-3, 0.03, []), (True, 1e-3, 0.03, []), (True, 0.3, 1.0, ["rise"]), (False, 0.1, 1.0, ["rise"])],
    ids=["LoRA", "in full", "in full, ever faster", "LoRA, ever faster"],
)
def test_of_real_training_only_what_comes_apart_is_told(
    full: bool, lr: float, warmup_fraction: float, expected: list[str], recipe: Callable[..., Recipe]
) -> None:
    """A learning rate that grows to the end, without clipping, first lowers a loss and then raises it."""
    lines = train_for_real(full=full, lr=lr, warmup_fraction=warmup_fraction)
    losses = np.array([line["loss"] for line in lines])
    lowest = min(losses[i : i + 30].mean() for i in range(0, 300, 30))
    assert (losses[-30:].mean() > 1.1 * lowest) == bool(expected)
    assert [warned["kind"] for warned in told(Watch(recipe()), lines)] == expected
