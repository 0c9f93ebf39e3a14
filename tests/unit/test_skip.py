"""Are exactly the samples passed over that `data.skip_ids` means, and is nothing else another for it?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpa_ray.batch import IGNORE_INDEX
from dpa_ray.data import shards, wire
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.data.prepared import Prepared
from dpa_ray.data.skip import Skipped, entry_of, find
from dpa_ray.engine import logs
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe, RecipeError, SourceEntry, SourceSection
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.stages.runs import Run, identity
from dpa_ray.stages.spec import BlindTask, InstructTask, ProxyLlmTask, ProxyMllmTask
from dpa_ray.store import Store
from tests.random_models import batch_of, make_step, make_vlm
from tests.small_recipes import keys_of
from tests.unit.test_ingest import equal, prepared_loader, text_only
from tests.unit.test_pipeline import carry_out
from tests.unit.test_sources import make, record

REPORT: Any = lambda _: None  # noqa: E731


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows to a group, five to a shard: rows, groups and shards are all told apart."""
    monkeypatch.setattr(shards, "MAX_GROUP_ROWS", 3)
    monkeypatch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 5)


def prepared_of(store: Store, section: SourceSection) -> Prepared:
    return prepare(store, section, max_quarantined_fraction=0)


# -- which rows an entry means


@pytest.mark.usefixtures("small_shards")
def test_ids_and_row_numbers_mean_the_same_samples(store: Store, tmp_path: Path) -> None:
    data = prepared_of(store, make(tmp_path, [record(i) for i in range(13)]))
    for row in range(13):
        by_id = find(store, {"data.instruct": data}, [f"r{row}"])
        by_row = find(store, {"data.instruct": data}, [entry_of(data.digest, row)])
        assert by_id.skipped == by_row.skipped == {"data.instruct": (Skipped(row, f"r{row}", f"set.json#{row}"),)}
        assert not by_id.errors + by_row.errors


@pytest.mark.usefixtures("small_shards")
def test_an_id_means_every_sample_that_has_it_in_all_training_data(store: Store, tmp_path: Path) -> None:
    captions = prepared_of(store, make(tmp_path / "a", [{**record(i), "id": f"x{i % 4}"} for i in range(9)]))
    talks = prepared_of(store, make(tmp_path / "b", [{**record(i), "id": f"x{i}"} for i in range(3, 7)]))
    sets = {"data.pretrain": captions, "data.instruct": talks}
    found = find(store, sets, ["x3", entry_of(captions.digest, 0), "x3", "x5"])
    assert {name: [s.row for s in rows] for name, rows in found.skipped.items()} == {
        "data.pretrain": [0, 3, 7], "data.instruct": [0, 2],
    }  # fmt: skip


@pytest.mark.usefixtures("small_shards")
def test_a_sample_that_a_mixture_takes_twice_is_passed_over_twice(store: Store, tmp_path: Path) -> None:
    source, other = (
        str(make(tmp_path / n, [record(i) for i in r]).source) for n, r in (("a", range(7)), ("b", range(7, 9)))
    )
    entries = [{"source": source, "weight": 2}, {"source": other}]
    mixture = prepared_of(store, SourceSection(source=[SourceEntry(**e) for e in entries]))
    assert mixture.num_rows == 16
    for entry in ("r6", entry_of(mixture.digest, 6), entry_of(mixture.digest, 13)):
        found = find(store, {"data.pretrain": mixture}, [entry]).skipped["data.pretrain"]
        assert [(s.row, s.id) for s in found] == [(6, "r6"), (13, "r6")], entry
    assert [s.row for s in find(store, {"data.pretrain": mixture}, ["r8"]).skipped["data.pretrain"]] == [15]


def test_every_entry_that_means_no_sample_is_told(store: Store, tmp_path: Path) -> None:
    data = prepared_of(store, make(tmp_path, [record(i) for i in range(3)]))
    other = "0" * 8 if not data.digest.startswith("0" * 8) else "1" * 8
    entries = ["r1", "r7", f"{other}:1", entry_of(data.digest, 3), "", "r 1"]
    found = find(store, {"data.instruct": data}, entries)
    assert [key for key, _ in found.errors] == [f"data.skip_ids.{n}" for n in (1, 2, 3, 4, 5)]
    told = dict(found.errors)
    assert told["data.skip_ids.1"].endswith(f"data.instruct ({data.digest}), found 'r7', which none has")
    assert told["data.skip_ids.2"] == f"expected the first digits of data.instruct ({data.digest}), found '{other}:1'"
    assert told["data.skip_ids.3"].startswith("expected a row of data.instruct below 3, found ")


# -- what becomes of them in batches


def assert_passed_over(loader: Loader, rows: list[int], skipped: set[int]) -> None:
    """Of the skipped rows nothing is left but their names; the others are what they were."""
    plain, passing = loader.load(np.array(rows), 0), replace(loader, skipped=frozenset(skipped)).load(np.array(rows), 0)
    assert (passing.rows, passing.ids, passing.places) == (plain.rows, plain.ids, plain.places)
    assert (passing.num_samples, passing.num_skipped) == (len(rows), len(skipped & set(rows)))
    kept = [b for b, row in enumerate(rows) if row not in skipped]
    others = loader.load(np.array(rows)[kept], 0)
    assert (passing.num_tokens, passing.num_targets) == (others.num_tokens, others.num_targets)
    assert torch.equal(passing.pixel_values, others.pixel_values)
    assert passing.untaught == others.untaught
    width = others.input_ids.shape[1]
    for name in ("input_ids", "labels", "attention_mask", "turn", "image_mask"):
        assert torch.equal(getattr(passing, name)[kept][:, :width], getattr(others, name)), name
    for b in set(range(len(rows))) - set(kept):
        assert int(passing.attention_mask[b].sum()) == 1
        assert passing.input_ids[b].unique().tolist() == [loader.pad_token_id]
        assert (passing.labels[b] == IGNORE_INDEX).all()
    assert equal(wire.loads(wire.dumps(replace(loader, skipped=frozenset(skipped)).arrays(np.array(rows), 0))), passing)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_of_a_skipped_sample_nothing_reaches_the_model(template: str, tmp_path: Path) -> None:
    loader = prepared_loader(tmp_path, [text_only(i) if i == 2 else record(i) for i in range(6)], template=template)
    assert_passed_over(loader, [4, 1, 2, 0], {1})
    assert_passed_over(loader, [4, 1, 2, 0], {2, 4, 5})


def test_a_batch_and_a_filler_of_skipped_samples_alone_have_neither_image_nor_target(tmp_path: Path) -> None:
    loader = replace(prepared_loader(tmp_path, [record(i) for i in range(3)]), skipped=frozenset({0, 1}))
    for batch, num_samples in ((loader.load(np.array([0, 1]), 0), 2), (loader.load(np.array([], np.int64), 1), 0)):
        assert (batch.num_samples, batch.num_tokens, batch.num_targets) == (num_samples, 0, 0)
        assert len(batch.pixel_values) == 0
        assert not batch.image_mask.any()


def test_a_sample_that_cannot_be_decoded_is_told_with_what_skips_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that was within the limits when it was prepared; skipped, it is not decoded any more."""
    loader = prepared_loader(tmp_path, [record(i) for i in range(3)])
    monkeypatch.setattr("dpa_ray.data.images.MAX_PIXELS", 10)
    entry = entry_of(loader.prepared.digest, 1)
    with pytest.raises(
        UserError, match=f"set.json#1: .* does not decode.*; to go on without.* '{entry}' to data.skip_ids"
    ):
        loader.load(np.array([1]), 0)
    batch = replace(loader, skipped=frozenset({1})).load(np.array([1]), 0)
    assert (batch.num_skipped, len(batch.pixel_values)) == (1, 0)


def test_packed_they_take_one_place(tmp_path: Path) -> None:
    loader = replace(prepared_loader(tmp_path, [text_only(i) for i in range(5)], template="text"), packing=True)
    plain, passing = loader.load(np.arange(5), 0), replace(loader, skipped=frozenset({3})).load(np.arange(5), 0)
    assert passing.sample is not None
    assert int((passing.sample == 3).sum()) == 1
    assert (passing.labels[passing.sample == 3] == IGNORE_INDEX).all()
    assert plain.num_tokens > passing.num_tokens == int((passing.sample >= 0).sum()) - 1


@pytest.mark.parametrize("weights", ["uniform", "prob"])
@pytest.mark.parametrize("others", [["s2 I t4", "I t5"], ["s2 t4", "s1 t2"]], ids=["images", "text"])
def test_what_stands_for_it_changes_no_sum_and_no_gradient(weights: str, others: list[str]) -> None:
    """One token without target, beside the others and alone in a pass."""
    found = []
    for passes in ([others], [[others[0], "s1", others[1]]], [others, ["s1"]]):
        module = make_step(make_vlm(), weights).train()
        sums = [module(batch_of(notations)) for notations in passes]
        sum((s.loss for s in sums), start=torch.zeros(())).backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        found.append((sum(s.detached() for s in sums), torch.cat([grad.flatten() for grad in grads])))
    for total, grads in found[1:]:
        torch.testing.assert_close(total, found[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-5)


# -- stages, keys, names, records


def data_digests(made: Recipe) -> dict[str, str]:
    plan = make_plan(made, Store(made.store), make=False, report=REPORT)
    return {name: plan.data[name][1] for name in ("pretrain", "instruct")}


def test_only_the_stages_that_take_the_sample_are_others(recipe: Callable[..., Recipe]) -> None:
    before = keys_of(recipe())
    digests = data_digests(recipe())
    made = recipe(f"data.skip_ids={json.dumps([entry_of(digests['instruct'], 0)])}")
    make_plan(made, Store(made.store), make=True, report=REPORT)  # prepares the data

    def changed(*entries: str) -> set[str]:
        after = keys_of(recipe(f"data.skip_ids={json.dumps(entries)}"))
        return {name for name, key in before.items() if after[name] != key}

    assert changed() == set()
    assert changed(entry_of(digests["instruct"], 4)) == {"instruct", "eval"}
    everything = {"proxy_llm", "proxy_merged", "blind", "proxy_mllm", "instruct", "eval"}
    assert changed(entry_of(digests["pretrain"], 4)) == everything, "q is the proxy's, which is another"


def test_q_of_the_same_llm_is_shared_with_and_without(recipe: Callable[..., Recipe]) -> None:
    base = "method=cmo"
    entry = entry_of(data_digests(recipe(base))["pretrain"], 4)
    before, after = (keys_of(recipe(base, *more)) for more in ((), (f"data.skip_ids=['{entry}']",)))
    assert before["blind"] == after["blind"]
    assert before["proxy_mllm"] != after["proxy_mllm"]


def test_the_key_has_rows_however_they_are_named(recipe: Callable[..., Recipe]) -> None:
    digest = data_digests(recipe())["instruct"]
    rows = [entry_of(digest, 2), digest + ":5"]
    plans = [
        make_plan(recipe(f"data.skip_ids={json.dumps(entries)}"), Store(recipe().store), make=True, report=REPORT)
        for entries in (rows, [*rows[::-1], rows[0]])
    ]
    assert plans[0].inputs["instruct"]["data"]["skipped"] == [2, 5]
    assert plans[0].refs == plans[1].refs
    assert "skipped" not in plans[0].inputs["proxy_llm"]["data"]


def test_an_entry_that_means_no_sample_is_an_error_of_the_recipe(recipe: Callable[..., Recipe]) -> None:
    made = recipe("data.skip_ids=[nobody]")
    with pytest.raises(
        RecipeError, match=r"data.skip_ids.0: expected the id of a sample.*found 'nobody', which none has"
    ):
        make_plan(made, Store(made.store), make=True, report=REPORT)


def test_the_tasks_are_told_which_rows(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    digests = data_digests(recipe())
    entries = [entry_of(digests["pretrain"], 3), entry_of(digests["instruct"], 1)]
    tasks = carry_out(recipe(f"data.skip_ids={json.dumps(entries)}"), tmp_path)
    readers = [(type(task), getattr(task, "reader", task)) for task in tasks]
    found = {kind: [s.row for s in reader.skipped] for kind, reader in readers if hasattr(reader, "skipped")}
    assert found == {ProxyLlmTask: [3], ProxyMllmTask: [3], BlindTask: [3], InstructTask: [1]}


def test_a_failed_run_goes_on_under_its_name_without_them(recipe: Callable[..., Recipe]) -> None:
    store = Store(recipe().store)
    mended, otherwise = recipe("data.skip_ids=[x]"), recipe("data.skip_ids=[x]", "stages.instruct.lr=0.125")
    assert identity(recipe()) != identity(mended)
    for status, taken in (("failed", False), ("done", True), ("running", False)):
        Run(store, recipe()).write(status)
        store.write_bytes("runs/small/metrics.jsonl", b"{}\n")
        Run(store, recipe()).check_name()
        if taken:
            with pytest.raises(RecipeError):
                Run(store, mended).check_name()
        else:
            Run(store, mended).check_name()
        with pytest.raises(RecipeError):
            Run(store, otherwise).check_name()


def test_an_empty_list_is_as_if_it_were_not_there(recipe: Callable[..., Recipe]) -> None:
    content = recipe().to_dict()
    assert content["data"].pop("skip_ids") == []
    assert identity(recipe("data.skip_ids=[]")) == identity(recipe())


def test_the_runs_quarantine_names_those_that_the_steps_took(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    cursor = Cursor([20], seed=0, global_batch_size=4, window=100)
    taken = {int(row) for step in range(2) for row in cursor.rows(0, step)}
    skipped = tuple(Skipped(row, None, f"set#{row}") for row in range(20))
    section = SimpleNamespace(max_length=60)
    recipe = SimpleNamespace(stages=SimpleNamespace(instruct=section), debug=SimpleNamespace(record_samples=False))
    task: Any = SimpleNamespace(
        stage="instruct", run_path="runs/r", num_steps=2, skipped=skipped, recipe=recipe,
        data=SimpleNamespace(digest="d", num_rows=20),
    )  # fmt: skip
    logs.Recorder(store, task, cursor, lambda *_, **__: None, logs.Before(), 0.0).close()
    lines = [json.loads(line) for line in store.read_bytes("runs/r/quarantine.jsonl").splitlines()]
    assert [line["row"] for line in lines] == sorted(taken)
    assert {line["reason"] for line in lines} == {"skipped"}
    assert lines[0]["place"] == f"set#{min(taken)}"
