"""Is data without anything to learn in it told before training, and are single samples of that kind named?"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpa_ray.batch import IGNORE_INDEX
from dpa_ray.data import wire
from dpa_ray.data.prepare import prepare
from dpa_ray.engine import logs
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe, RecipeError
from dpa_ray.stages import supervision
from dpa_ray.stages.supervision import Supervision, check, measure, sampled_rows
from dpa_ray.store import Store
from tests.encoders import encoder, style
from tests.unit.test_ingest import prepared_loader
from tests.unit.test_sources import make, record


def talk(i: int, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"r{i}", "conversations": turns}


def measured(tmp_path, records, template: Any = "chat", max_length: int = 10_000):
    store = Store(str(tmp_path / "store"))
    prepared = prepare(store, make(tmp_path, records), max_quarantined_fraction=0)
    made = encoder(style("qwen2.5")[0], template, max_length)
    return measure(store, prepared, made), made


def test_the_sampled_rows_are_spread_from_the_first_to_the_last_group():
    assert sampled_rows([2, 3]) == [0, 1, 2, 3, 4]
    rows = sampled_rows([64] * 1000)
    assert len(rows) == supervision.SAMPLED_GROUPS * supervision.ROWS_PER_GROUP
    assert rows[0] == 0
    assert rows[-1] == 64 * 999 + supervision.ROWS_PER_GROUP - 1
    assert rows == sorted(set(rows))


def test_the_fraction_counts_text_tokens_only(tmp_path):
    found, made = measured(tmp_path, [record(0), record(1)], template="plain")
    assert (found.num_samples, found.nothing_to_learn) == (2, ())
    assert found.num_text_tokens == found.num_targets > 0, "a caption is a target as a whole, whatever its image has"
    assert check(found, stage="proxy_mllm", encoder=made, source="set.json") is None


def test_ordinary_conversations_pass(tmp_path):
    found, made = measured(tmp_path, [talk(i, "Is the square red or blue? " * 9, "Red") for i in range(5)])
    assert 0.005 < found.fraction < 0.995
    assert check(found, stage="instruct", encoder=made, source="set.json") is None


def test_data_whose_answers_are_cut_off_is_refused_with_the_key_to_raise(tmp_path):
    found, made = measured(tmp_path, [talk(i, "What is it? " * 40, "Red") for i in range(5)], max_length=30)
    assert found.nothing_to_learn == tuple(f"set.json#{i}" for i in range(5))
    with pytest.raises(UserError, match=r"0.00%.*5 of 5 .*stages.instruct.max_length=30.*raise it.*check_supervision"):
        check(found, stage="instruct", encoder=made, source="set.json")


def test_some_samples_with_nothing_left_are_told_and_not_refused(tmp_path):
    records = [talk(i, "What is it? " * (40 if i == 2 else 1), "Red") for i in range(5)]
    found, made = measured(tmp_path, records, max_length=60)
    note = check(found, stage="instruct", encoder=made, source="set.json")
    assert note is not None
    assert "1 of 5 samples" in note
    assert "set.json#2" in note


@pytest.mark.parametrize(
    ("template", "targets", "refused"),
    [("chat", 4, True), ("chat", 5, False), ("chat", 995, False), ("chat", 996, True), ("text", 1000, False)],
)
def test_the_bounds_are_as_stated(template, targets, refused):
    found, made = Supervision(9, 1000, targets, ()), encoder(style("qwen2.5")[0], template)
    if not refused:
        assert check(found, stage="instruct", encoder=made, source="s") is None
        return
    with pytest.raises(UserError, match=f"{targets} are trained on .*expected at .*data.check_supervision=false"):
        check(found, stage="instruct", encoder=made, source="s")


# -- samples without a target in a batch, and in the run's quarantine


def test_a_batch_names_its_samples_without_a_target(tmp_path):
    records = [talk(0, "Hm?", "Red"), talk(1, "What is it? " * 40, "Red"), talk(2, "Hm?", "Blue")]
    loader = prepared_loader(tmp_path, records)
    loader.encoder.max_length = 60
    batch = loader.load(np.arange(3), 0)
    assert batch.untaught == [(1, "r1", "set.json#1")]
    assert batch.num_samples == 3
    assert (batch.labels[1] == IGNORE_INDEX).all()
    assert wire.loads(wire.dumps(loader.arrays(np.arange(3), 0))).untaught == batch.untaught
    assert loader.load(np.array([], np.int64), 1).untaught == [], "filler is no sample"


def test_the_runs_quarantine_names_each_once_and_keeps_other_stages(tmp_path):
    store = Store(str(tmp_path))
    for stage, untaught in (("proxy_mllm", [(7, None, "a#7")]), ("instruct", [(9, "x", "b#9"), (3, "y", "b#3")])):
        section = SimpleNamespace(max_length=60)
        stages = SimpleNamespace(proxy_mllm=section, instruct=section)
        task: Any = SimpleNamespace(
            stage=stage, run_path="runs/r", data=SimpleNamespace(digest="d"), recipe=SimpleNamespace(stages=stages)
        )
        for _ in range(2):  # a stage that is done again replaces its lines
            log = logs.UntaughtLog(store, task)
            for _ in range(2):  # two epochs
                log.add([SimpleNamespace(untaught=untaught)])  # type: ignore[list-item]
            log.close()
    lines = [json.loads(line) for line in store.read_bytes("runs/r/quarantine.jsonl").splitlines()]
    assert [(n["stage"], n["row"], n["id"], n["place"]) for n in lines] == [
        ("proxy_mllm", 7, None, "a#7"), ("instruct", 3, "y", "b#3"), ("instruct", 9, "x", "b#9"),
    ]  # fmt: skip
    assert {n["reason"] for n in lines} == {"nothing_to_learn"}


# -- preflight


@pytest.mark.parametrize("key", ["data.eval", "data.eval_extra.colours"])
def test_settings_that_a_held_out_set_would_ignore_are_errors(key: str, recipe: Callable[..., Recipe]) -> None:
    extra = ["data.eval_extra={colours: {source: 'builtin:shapes'}}"]
    with pytest.raises(RecipeError, match=f"{key}.fraction: .*found 0.5(.|\n)*{key}.image_aspect: .*found pad"):
        recipe(*extra, f"{key}.fraction=0.5", f"{key}.image_aspect=pad")
    recipe(*extra, f"{key}.fraction=1.0")
