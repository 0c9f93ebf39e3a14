"""Is a step whose numbers are not finite traced to its samples, and is enough kept of it to look into?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dpa_ray.batch import IGNORE_INDEX, Batch
from dpa_ray.data import wire
from dpa_ray.engine.nonfinite import Failed, Finding, StepSample, find
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.postmortem import BATCH, RECORD, Postmortem, describe
from dpa_ray.model.packed import alone
from dpa_ray.store import Store
from tests.engine_worker import SETTINGS, poison
from tests.random_models import batch_of, make_step, make_vlm, packed_of

DIGEST = "0123456789abcdef"
NOTATIONS = ["s2 I t4", "I s1 I t5", "s3 t2", "s1 I g2 t3 s1 u2"]


# -- one sample of a batch, alone


@pytest.mark.parametrize("layout", [None, [[2, 0], [3, 1]], [[1, 3, 0, 2]]])
def test_each_sample_alone_is_itself(layout: list[list[int]] | None) -> None:
    """Tokens, targets, turns, and its own images, however they were laid out."""
    batch = batch_of(NOTATIONS)
    laid_out = packed_of(batch, layout) if layout else batch
    laid_out.ids, laid_out.places = list("abcd"), list("ABCD")
    for number, notation in enumerate(NOTATIONS):
        mine, expected = alone(laid_out, number), batch_of([notation])
        for name in ("input_ids", "attention_mask", "labels", "turn", "grounded", "image_mask", "pixel_values"):
            assert torch.equal(getattr(mine, name), getattr(expected, name)), name
        assert (mine.num_samples, mine.num_tokens, mine.num_targets) == (1, expected.num_tokens, expected.num_targets)
        assert (mine.rows, mine.ids, mine.places) == ([batch.rows[number]], ["abcd"[number]], ["ABCD"[number]])


def test_filler_alone_is_no_sample() -> None:
    mine = alone(batch_of(["s2 I t4", "I t3"], num_filler=1), 1)
    assert (mine.num_samples, mine.num_tokens, mine.num_targets, mine.rows) == (0, 0, 0, [])


# -- which samples it comes from


def engine_of(what: str) -> PlainEngine:
    step = make_step(make_vlm(), "prob").train()
    for name, parameter in step.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    poison(step, what)
    return PlainEngine(step, SETTINGS, torch.device("cpu"))


def step_of(poisoned: set[int]) -> list[Batch]:
    """Two micro-batches of three; the samples of these rows have the token 11, the last target."""
    batches = []
    for first in (0, 3):
        batch = batch_of(["s2 I t4", "I t5", "s3 t6"])
        batch.input_ids[batch.input_ids == 11] = 1
        for i in range(3):
            if first + i in poisoned:
                batch.input_ids[i, int(batch.attention_mask[i].sum()) - 1] = 11
        batch.labels = torch.where(batch.labels != IGNORE_INDEX, batch.input_ids, IGNORE_INDEX)
        batch.rows = [(DIGEST, first + i) for i in range(3)]
        batch.ids, batch.places = [None, "b", "c"], [f"set#{first + i}" for i in range(3)]
        batches.append(batch)
    return batches


def finding_of(what: Any, poisoned: set[int], *, packed: bool = False) -> Finding:
    engine, batches = engine_of(what), step_of(poisoned)
    if packed:
        fields = ("rows", "ids", "places")
        laid_out = [packed_of(batch, [[0, 1, 2]]) for batch in batches]
        for one, batch in zip(laid_out, batches, strict=True):
            vars(one).update({name: getattr(batch, name) for name in fields})
        batches = laid_out
    finite = [bool(engine.forward(batch).detached().isfinite().all()) for batch in batches]
    num_targets = sum(batch.num_targets for batch in batches)
    return find(engine, Failed(what, "instruct", 7, 1e-3, num_targets, batches, finite))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("poisoned", [{1}, {4}, {0, 1, 5}])
def test_a_loss_comes_from_the_samples_that_have_it_alone(poisoned: set[int], packed: bool) -> None:
    """Packed too, where one that is not finite spoils those in its row."""
    finding = finding_of("loss", poisoned, packed=packed)
    assert {sample.row for sample in finding.guilty} == poisoned
    assert not finding.all_guilty
    assert finding.batches == [(0, number) for number in sorted({row // 3 for row in poisoned})]
    assert finding.batch == (0, min(poisoned) // 3)
    tried = [sample for sample in finding.samples if sample.finite]
    assert all(sample.loss is not None and sample.loss > 0 for sample in tried)
    assert all(s.finite is None for s in finding.samples if (0, s.number) not in finding.batches), (
        "not looked for there"
    )


def test_a_gradient_comes_from_the_samples_that_have_it_alone() -> None:
    finding = finding_of("gradient", {4})
    assert finding.batches == [], "the losses are finite"
    assert [sample.row for sample in finding.guilty] == [4]
    assert finding.batch == (0, 1)


def test_the_search_leaves_neither_gradients_nor_mode_behind() -> None:
    engine = engine_of("gradient")
    find(engine, Failed("gradient", "instruct", 7, 1e-3, 10, step_of({4}), [True, True]))
    assert engine.module.training
    assert all(parameter.grad is None for parameter in engine.parameters)
    assert all(total is None for total in engine.sums)


def test_a_search_that_fails_does_not_hide_what_stopped_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(PlainEngine, "forward", out_of_memory)
    finding = find(engine_of("loss"), Failed("loss", "instruct", 7, 1e-3, 10, step_of({4}), [True, False]))
    text = describe(finding)
    assert "the loss is not finite" in text
    assert "could not be found out (OutOfMemoryError: CUDA out of memory.). Its samples: no id (row 0, set#0)" in text


def test_a_lone_sample_is_not_taken_for_all_of_them() -> None:
    sample = StepSample(0, 0, DIGEST, 3, "x", None, True, finite=False)
    failed = Failed("loss", "instruct", 7, 1e-3, 10, [], [])
    assert "skip_ids" in describe(Finding(failed, [sample], [(0, 0)], True))
    assert "skip_ids" not in describe(Finding(failed, [sample] * 2, [(0, 0)], True))
    untaught = StepSample(0, 0, DIGEST, 4, "y", None, False)
    assert "skip_ids" not in describe(Finding(failed, [sample, sample, untaught], [(0, 0)], True))


# -- what is kept


def postmortem(store: Store, skip_ids: list[str], lines: list[str]) -> Postmortem:
    recipe = SimpleNamespace(
        data=SimpleNamespace(retry_s=0.0, skip_ids=skip_ids), precision="fp32",
        stages=SimpleNamespace(instruct=SimpleNamespace(micro_batch_size=3)),
    )  # fmt: skip
    task: Any = SimpleNamespace(
        recipe=recipe, stage="instruct", run_path="runs/r", num_steps=9, data=SimpleNamespace(digest=DIGEST),
        result=SimpleNamespace(stage="instruct", key="k"),
    )  # fmt: skip
    return Postmortem(store, task, lines)


def test_the_guilty_micro_batch_and_all_that_is_known_is_kept(tmp_path: Path) -> None:
    store, finding = Store(str(tmp_path)), finding_of("loss", {4})
    lines = [
        json.dumps({"stage": "instruct", "step": step, "loss": 2.0, "grad_norm": float("inf")}) for step in range(1, 31)
    ]
    text = postmortem(store, ["old"], lines)(finding)
    folder = tmp_path / "runs/r/failures/instruct-step-7"
    assert f"Kept for a look: {folder}" in text
    assert """run the same command with 'data.skip_ids=["old", "01234567:4"]'""" in text
    assert sorted(path.name for path in folder.iterdir()) == sorted([RECORD, BATCH])
    record = json.loads((folder / RECORD).read_text(), parse_constant=pytest.fail)
    assert (record["what"], record["stage"], record["step"], record["lr"]) == ("loss", "instruct", 7, 1e-3)
    assert [(s["row"], s["id"], s["place"]) for s in record["samples"]][4] == (4, "b", "set#4")
    assert [s["row"] for s in record["samples"] if s["finite"] is False] == [4]
    assert record["not_finite"] == [{"rank": 0, "micro_batch": 1}]
    assert [line["step"] for line in record["metrics"]] == [*range(11, 31)]
    assert record["metrics"][0]["grad_norm"] is None
    assert record["skip_ids"] == ["old", "01234567:4"]
    batch = wire.loads(((folder / BATCH).read_bytes(), json.dumps(record["batch"]["fields"])))
    expected = step_of({4})[1]
    assert (batch.rows, batch.ids, batch.places) == (expected.rows, expected.ids, expected.places)
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.pixel_values, expected.pixel_values)
    with safe_open(str(folder / BATCH), "pt") as file:  # a tool that knows safetensors alone
        assert torch.equal(file.get_tensor("labels"), expected.labels)


def test_a_step_that_comes_from_no_sample_keeps_its_record(tmp_path: Path) -> None:
    failed = Failed("gradient", "instruct", 7, 1e-3, 10, step_of(set()), [True, True])
    samples = [StepSample(0, 0, DIGEST, row, None, None, True, finite=True, loss=1.0) for row in range(3)]
    text = postmortem(Store(str(tmp_path)), [], [])(Finding(failed, samples, [], True))
    assert "None of its 3 samples gives that alone: it is the gradient of the whole step" in text
    record = json.loads((tmp_path / "runs/r/failures/instruct-step-7" / RECORD).read_text())
    assert record["batch"] is None
    assert len(record["samples"]) == 3


def test_a_store_that_takes_nothing_does_not_hide_what_stopped_the_step(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    text = postmortem(Store(str(tmp_path)), [], [])(finding_of("loss", {4}))
    assert "the loss is not finite" in text
    assert "Nothing could be kept of it for a look (" in text
    assert "data.skip_ids" in text
