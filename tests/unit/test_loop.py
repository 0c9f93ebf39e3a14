"""Does the training loop make the same steps however they are cut, draw what it drew before, and stop where it must?"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import Cursor
from dpa_ray.engine import loop
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.errors import UserError
from dpa_ray.pack import pack
from tests.engine_worker import SETTINGS
from tests.random_models import batch_of, make_step, make_vlm, packed_of
from tests.unit.test_engines import copies, plain

NOTATIONS = ["s1 I t6", "s2 t4", "I t5", "s2 I s1 t4 s1 u3", "s3 I g2 t3", "s1 t9", "s2 I s3", "I I t2"]


def run_loop(
    engine: PlainEngine,
    *,
    micro_batch_size: int = 8,
    notations: list[str] | None = None,
    packing: bool = False,
    seed: int = 0,
    steps_done: int = 0,
) -> list[dict[str, Any]]:
    """Two epochs of two steps of 4 over eight samples; gives the recorded metrics."""
    samples = notations or NOTATIONS
    cursor = Cursor([len(samples)], seed=0, global_batch_size=4, window=100)
    plan = Plan(cursor, 4, rank=0, world_size=1, micro_batch_size=micro_batch_size, steps_done=steps_done)

    def batches() -> Iterator[Batch]:
        for rows, filler in plan:
            chosen = [samples[row] for row in rows] or [samples[filler]]
            batch = batch_of(chosen, num_filler=0 if len(rows) else 1)
            if packing:
                batch = packed_of(batch, pack(batch.attention_mask.sum(1).tolist(), 64))
            batch.ids, batch.rows = [f"id{row}" for row in rows], [("data", int(row)) for row in rows]
            yield batch

    lines: list[dict[str, Any]] = []
    train(
        engine, batches(), plan, Schedule(4, 1e-2, 0.5), stage="instruct", seed=seed, device=torch.device("cpu"),
        record=lambda line, _: lines.append(line),
    )  # fmt: skip
    return lines


def test_micro_batch_size_does_not_change_the_loop() -> None:
    """4 = 2 x 2 = 4 x 1 = 3 + 1. Everything that is logged but time."""
    engines, logs = [], []
    for size in (4, 3, 2, 1):
        engines.append(plain())
        logs.append(run_loop(engines[-1], micro_batch_size=size))
    assert [line["lr"] for line in logs[0]] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    assert [line["epoch"] for line in logs[0]] == [0, 0, 1, 1]
    for log, engine in zip(logs[1:], engines[1:], strict=True):
        for first, line in zip(logs[0], log, strict=True):
            for key in set(line) - {"stage", "step_time_s", "data_wait_s", "tokens_per_s", "packing_efficiency"}:
                assert line[key] == pytest.approx(first[key], rel=1e-4), key
        for one, other in zip(copies(engines[0]), copies(engine), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_a_step_is_divided_by_its_weights_before_it_is_clipped() -> None:
    """Its norm is that of sum(w * nll) / sum(w) over the whole step, by autograd alone, in one pass and in four."""
    cursor = Cursor([len(NOTATIONS)], seed=0, global_batch_size=4, window=100)
    by_hand = plain()
    sums = by_hand.module(batch_of([NOTATIONS[row] for row in cursor.rows(0, 0)]))
    (sums.loss / sums.weight.float()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in by_hand.parameters if p.grad is not None])
    for size in (4, 1):
        assert run_loop(plain(), micro_batch_size=size)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(("num_rows", "world_size", "micro_batch_size"), [(8, 1, 4), (10, 2, 1), (3, 4, 2), (9, 2, 3)])
def test_a_plan_knows_how_long_it_is_before_it_is_made(num_rows: int, world_size: int, micro_batch_size: int) -> None:
    """Counts without looking at a single row, and in all ranks' passes together every row of an epoch once."""
    cursor = Cursor([num_rows], seed=0, global_batch_size=4, window=100)
    num_steps = 2 * cursor.steps_per_epoch
    plans = [Plan(cursor, num_steps, rank, world_size, micro_batch_size) for rank in range(world_size)]
    passes = [plan.num_passes(step) for plan in plans[:1] for step in range(1, num_steps + 1)]
    assert plans[0].most_passes == max(passes)
    made = [list(pickle.loads(pickle.dumps(plan))) for plan in plans]
    assert [len(plan) for plan in plans] == [sum(passes)] * world_size == list(map(len, made))
    taken = sorted(int(row) for one in made for rows, _ in one for row in rows)
    assert taken == sorted([*range(num_rows)] * 2)


@pytest.mark.parametrize("steps_done", [0, 1, 3, 6])
def test_a_plan_without_its_first_steps_is_the_rest_of_it(steps_done: int) -> None:
    cursor = Cursor([9], seed=0, global_batch_size=4, window=100)
    whole = Plan(cursor, 6, rank=1, world_size=2, micro_batch_size=1)
    left = dataclasses.replace(whole, steps_done=steps_done)
    skipped = sum(whole.num_passes(step) for step in range(1, steps_done + 1))
    assert len(left) == len(whole) - skipped == len(list(left))
    assert [(rows.tolist(), filler) for rows, filler in left] == [(rows.tolist(), filler) for rows, filler in whole][
        skipped:
    ]
    assert list(left.steps()) == list(whole.steps())[steps_done:]


def test_what_dropout_draws_follows_from_seed_and_step_alone() -> None:
    """Whatever was drawn before: a stage that goes on at step 3 draws there what it would have drawn."""

    def log(seed: int, steps_done: int = 0) -> list[float]:
        engine = PlainEngine(dropping(), SETTINGS, torch.device("cpu"))
        lines = run_loop(engine, seed=seed, steps_done=steps_done)
        return [line["loss"] for line in lines]

    def dropping() -> Any:
        step = make_step(make_vlm(attention_dropout=0.3), "uniform").train()
        assert step.model.config.text_config.attention_dropout == 0.3
        return step

    first = log(0)
    torch.manual_seed(123)
    assert log(0) == first
    assert log(1) != first
    steps_left = log(0, steps_done=1)
    assert steps_left != first[1:], "it begins with other parameters"
    torch.rand(7)
    assert log(0, steps_done=1) == steps_left


def test_every_seed_stage_step_and_rank_draws_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, stage: str, step: int, rank: int) -> tuple[float, ...]:
        monkeypatch.setattr(loop, "rank", lambda: rank)
        loop._draw_from(seed, stage, step)
        return tuple(torch.rand(4).tolist())

    places = [
        (0, "instruct", 1, 0),
        (1, "instruct", 1, 0),
        (0, "proxy_llm", 1, 0),
        (0, "instruct", 2, 0),
        (0, "instruct", 1, 1),
    ]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(*places[0]) == drawn(*places[0])


def test_packing_does_not_change_the_loop() -> None:
    """Everything that is logged but time and how much of the computing was for padding, and every parameter."""
    engines = plain(), plain()
    logs = run_loop(engines[0]), run_loop(engines[1], packing=True)
    for unpacked, packed in zip(*logs, strict=True):
        assert unpacked["packing_efficiency"] < packed["packing_efficiency"] <= 1
        for key in set(packed) - {"stage", "step_time_s", "data_wait_s", "tokens_per_s", "packing_efficiency"}:
            assert packed[key] == pytest.approx(unpacked[key], rel=1e-4), key
    for one, other in zip(copies(engines[0]), copies(engines[1]), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_a_step_without_weight_makes_no_update() -> None:
    """Lower bound 0 and text only: all weights are 0. The loss is told as 0, and the parameters stay, to the bit."""
    engine = plain(bounds=(0.0, 0.5))
    before = copies(engine)
    lines = run_loop(engine, notations=["s2 t4", "s1 t9", "s5 t2"] * 4)
    assert [(line["updated"], line["loss"], line["grad_norm"], line["weight_mean"]) for line in lines] == [
        (False, 0, 0, 0)
    ] * 4
    assert all(line["nll_mean"] > 0.5 for line in lines)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(engine), strict=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples() -> None:
    engine = plain()
    with torch.no_grad():
        engine.module.model.lm_head.weight[3, 5] = torch.nan
    before = copies(engine)
    with pytest.raises(
        UserError, match=r"stage instruct, step 1: the loss is not finite; this step changed nothing.*id\d \(row \d\)"
    ):
        run_loop(engine)
    for one, other in zip(before, copies(engine), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    """The loss may be finite all the same."""
    engine = plain()
    engine.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    before = copies(engine)
    with pytest.raises(UserError, match="step 1: the gradient is not finite; this step changed nothing"):
        run_loop(engine)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(engine), strict=True))
