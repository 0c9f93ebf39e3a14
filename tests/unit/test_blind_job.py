"""Does the job compute q of just the samples that stage 2 takes, each once, and is it only ever read as what it is?"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Encoded
from dpa_ray.data import shards
from dpa_ray.data.blind_scores import BlindScores, file_name, write_scores
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepared import Prepared
from dpa_ray.data.skip import entry_of
from dpa_ray.engine import assembling, blind_job
from dpa_ray.engine.blind_job import chosen_rows, compute_blind, share, staging
from dpa_ray.errors import LeaseTaken, UserError
from dpa_ray.model.blind import TextSample, packed_scores
from dpa_ray.recipe import Recipe
from dpa_ray.stages import proxy_mllm
from dpa_ray.stages.pipeline import Pipeline, make_plan
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import BlindTask, ProxyMllmTask
from dpa_ray.store.artifacts import find
from dpa_ray.store.fs import Store
from tests import tiny_models
from tests.files import Asked

CPU = torch.device("cpu")


@pytest.fixture
def small(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Callable[..., BlindTask]:
    """`small(overrides)`: the job of a cmo run on 20 captions in four shards of five, row groups of two."""
    monkeypatch.setattr(shards, "MAX_GROUP_ROWS", 2)
    monkeypatch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 5)

    def make(*overrides: str) -> BlindTask:
        made = recipe("method=cmo", "data.pretrain.options.size=20", "data.eval=null", *overrides)
        store = Store(made.store)
        plan = make_plan(made, store, make=True, report=lambda _: None)
        task = Pipeline(plan, store, Run(store, made), report=lambda _: None)._task("blind")
        assert isinstance(task, BlindTask)
        return task

    return make


class Told:
    """The job's events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **values: Any) -> None:
        self.events.append((kind, values))

    @property
    def num_computed(self) -> int:
        return sum(kind == "blind_shard" for kind, _ in self.events)


def run(task: BlindTask, confirm: Callable[[], None] = lambda: None) -> Told:
    store, told = Store(task.recipe.store), Told()
    compute_blind(task, store, CPU, assembling.cursor_of(task.reader, store), told, confirm)
    return told


def loader_of(task: ProxyMllmTask, *, cached: bool = True) -> tuple[Loader, Any]:
    """Stage 2's loader and module, as the worker makes them."""
    store = Store(task.recipe.store)
    built = proxy_mllm.build_stage(task, store)
    blind = assembling.blind_scores(task, store) if cached else None
    return Loader(store, task.data, built.encoder, built.image_processor, 0, blind=blind), built.module


def test_stage_two_computes_the_same_with_it_as_live(small: Callable[..., BlindTask]) -> None:
    """Through shards, encoder, Parquet and a pickle; also a filler. fp32, and q agrees to 1e-6: see test_blind.py."""
    task = small()
    told = run(task)
    assert told.events[0] == ("blind_started", {"num_shards": 4, "num_done": 0})
    assert told.num_computed == 4
    assert told.events[-1] == ("blind_finished", {})
    loader, module = loader_of(task.reader)
    loader = pickle.loads(pickle.dumps(loader))
    live, _ = loader_of(task.reader, cached=False)
    rows = np.array([17, 0, 9, 4, 19])
    with_q, without = loader.load(rows, 0), live.load(rows, 0)
    assert with_q.log_q is not None
    assert without.log_q is None
    place = with_q.labels != IGNORE_INDEX
    sample, position = place.nonzero(as_tuple=True)
    scores, known = module._blind(without, sample, position, without.labels[place])
    assert known.all()
    torch.testing.assert_close(with_q.log_q[place].exp(), scores.log_prob.exp(), rtol=0, atol=1e-6)
    found, expected = (module(batch.to(CPU)).detached() for batch in (with_q, without))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    filler = loader.load(np.array([], np.int64), 3)
    assert filler.log_q is not None
    assert float(module(filler.to(CPU)).weight) == 0


def test_stage_two_computes_the_same_where_some_have_no_image(
    small: Callable[..., BlindTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those nothing is passed: their q is their p."""
    data = tiny_models.make_captions(tmp_path / "captions", 6, text_only=(1, 4, 5))
    task = small(f"data.pretrain={{source: {data.file}, images: {data.images}}}")
    passed: list[TextSample] = []

    def scores(llm: Any, samples: list[TextSample], *args: Any, **kwargs: Any) -> list[np.ndarray]:
        passed.extend(samples)
        return packed_scores(llm, samples, *args, **kwargs)

    monkeypatch.setattr(blind_job, "packed_scores", scores)
    run(task)
    assert len(passed) == 3
    found, expected = (
        module(loader.load(np.arange(6), 0).to(CPU)).detached()
        for loader, module in (loader_of(task.reader), loader_of(task.reader, cached=False))
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_frozen_stage_three_computes_the_same_with_it_as_live(
    family: str, recipe: Callable[..., Recipe], llm_folder: Callable[..., Path]
) -> None:
    """Conversations by the chat template, from a base LLM that stage 2 without a proxy has too; Gemma-2 caps its logits."""
    made = recipe("method=cmo", "stages.instruct.llm=frozen", "data.eval=null", f"model.llm={llm_folder(family)}")
    store = Store(made.store)
    plan = make_plan(made, store, make=True, report=lambda _: None)
    pipeline = Pipeline(plan, store, Run(store, made), report=lambda _: None)
    task, captions = pipeline._task("blind_instruct"), pipeline._task("proxy_mllm")
    assert isinstance(task, BlindTask)
    assert isinstance(captions, ProxyMllmTask)
    assert find(store, "blind-instruct", task.result.key) is None
    run(task)
    built = proxy_mllm.build_stage(captions, store)
    encode, blind = blind_job.encoder(task, store), assembling.blind_scores(task.reader, store)
    live, cached = (
        Loader(store, task.reader.data, encode, built.image_processor, 0, blind=scores).load(np.arange(9), 0).to(CPU)
        for scores in (None, blind)
    )
    assert cached.log_q is not None
    assert live.log_q is None
    assert encode.template == "chat"
    found, expected = (built.module(batch).detached() for batch in (cached, live))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_broken_off_it_goes_on_with_what_is_not_committed(
    small: Callable[..., BlindTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small()
    store = Store(task.recipe.store)
    scored, calls = blind_job._scored, [0]

    def dies(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(blind_job, "_scored", dies)
    with pytest.raises(KeyboardInterrupt):
        run(task)
    assert find(store, task.result.stage, task.result.key) is None
    assert [n for n in store.list(staging(task)) if n.endswith(".parquet")] == [file_name(0), file_name(1)]

    store.write_bytes(f"{staging(task)}/{file_name(3)}", b"half a file")  # died between a file and its digest
    broken = bytearray(store.read_bytes(f"{staging(task)}/{file_name(1)}"))
    broken[len(broken) // 2] ^= 1
    store.write_bytes(f"{staging(task)}/{file_name(1)}", bytes(broken))
    told = run(task)
    assert told.events[0] == ("blind_started", {"num_shards": 4, "num_done": 1})
    assert told.num_computed == 3
    artifact = find(store, task.result.stage, task.result.key)
    assert artifact is not None
    assert list(artifact.files) == [file_name(shard) for shard in range(4)]
    assert artifact.manifest["meta"]["num_shards_found"] == 1
    assert store.list(staging(task)) == []
    monkeypatch.setattr(blind_job, "_scored", scored)
    before = {name: store.read_bytes(f"{artifact.path}/{name}") for name in artifact.files}
    store.delete(artifact.path)
    run(task)
    assert before == {name: store.read_bytes(f"{artifact.path}/{name}") for name in artifact.files}


def test_whoever_was_replaced_makes_no_artifact_and_leaves_what_is_staged(small: Callable[..., BlindTask]) -> None:
    """Asked before the artifact's folder is emptied, before its manifest, and before what it was made of goes."""
    task = small()
    store = Store(task.recipe.store)
    for taken_at in (1, 2, 3):
        asked = Asked(taken_at)
        with pytest.raises(LeaseTaken):
            run(task, asked)
        assert asked.num == taken_at
        assert len(store.list(staging(task))) == 8, "four files and their digests"
        assert (find(store, task.result.stage, task.result.key) is not None) == (taken_at == 3)


def test_no_digest_is_written_of_a_file_that_did_not_come(small: Callable[..., BlindTask], tmp_path: Path) -> None:
    task = small()
    store = Store(task.recipe.store)
    (tmp_path / file_name(0)).write_bytes(b"scores")
    blocker = Path(store.url(staging(task))) / file_name(0)  # a folder where the file should be
    (blocker / "x").mkdir(parents=True)
    with pytest.raises(UserError):
        blind_job._stage(store, task, tmp_path, file_name(0))
    assert store.list(staging(task)) == []


def _rank(rank: int, meeting: str, task: BlindTask) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    told = run(task)
    assert told.num_computed == (2 if rank == 0 else 1), "three shards are left"
    torch.distributed.destroy_process_group()


@pytest.mark.ci
def test_two_workers_share_what_is_left(small: Callable[..., BlindTask], tmp_path: Path) -> None:
    """Three of four shards, after one was done by a worker alone: the same files, to the bit."""
    task = small()
    store = Store(task.recipe.store)
    run(task)
    alone = {name: store.read_bytes(f"{task.result.path}/{name}") for name in store.list(task.result.path)}
    (tmp_path / file_name(0)).write_bytes(alone[file_name(0)])
    blind_job._stage(store, task, tmp_path, file_name(0))
    store.delete(task.result.path)
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "meeting"), task), nprocs=2)
    for name, data in alone.items():
        if name != "manifest.json":
            assert store.read_bytes(f"{task.result.path}/{name}") == data
    artifact = find(store, task.result.stage, task.result.key)
    assert artifact is not None
    meta = artifact.manifest["meta"]
    assert (meta["world_size"], meta["num_shards"], meta["num_shards_found"]) == (2, 4, 1)


@pytest.mark.parametrize("overrides", [("data.pretrain.fraction=0.5",), ("stages.proxy_mllm.max_steps=2",)])
def test_only_samples_that_stage_two_takes_are_computed(
    overrides: tuple[str, ...], small: Callable[..., BlindTask]
) -> None:
    """10 of 20 captions, or two steps of four; what was not asked for is refused, by its place."""
    task = small(*overrides, "data.shuffle_window=6")
    told = run(task)
    cursor = assembling.cursor_of(task.reader, Store(task.recipe.store))
    taken = {int(r) for step in range(task.reader.num_steps) for r in cursor.rows(0, step)}
    assert len(taken) == (10 if "fraction" in overrides[0] else 8)
    assert sum(v["num_samples"] for kind, v in told.events if kind == "blind_shard") == len(taken)
    loader, _ = loader_of(task.reader)
    for row in range(20):
        if row in taken:
            loader.load(np.array([row]), row)
        elif row // 5 in {r // 5 for r in taken}:
            with pytest.raises(
                UserError, match=rf"#{row}: expected q of \d+ targets, found none in row {row} of .*blind-"
            ):
                loader.load(np.array([row]), row)


def test_a_flipped_bit_is_told_with_the_file(small: Callable[..., BlindTask]) -> None:
    task = small()
    run(task)
    file = Path(task.recipe.store) / task.result.path / file_name(2)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(bytes(data))
    loader, _ = loader_of(task.reader)
    loader.load(np.array([0, 9]), 0)
    with pytest.raises(UserError, match=rf"{file_name(2)}: expected SHA-256"):
        loader.load(np.array([10]), 0)


@pytest.mark.parametrize(
    "change",
    ["data.pretrain.options.seed=7", "model.llm=OTHER_LLM", "stages.proxy_mllm.max_length=40", "precision=bf16"],
)
def test_q_of_other_data_models_or_lengths_is_never_taken(
    change: str, small: Callable[..., BlindTask], models: dict[str, str]
) -> None:
    """Each has a key of its own, under which there is nothing; what is copied there by hand is no artifact of that key."""
    task, other = small(), small(change.replace("OTHER_LLM", models["other_llm"]))
    run(task)
    assert other.result.key != task.result.key
    loader, _ = loader_of(other.reader)
    with pytest.raises(UserError, match="expected a finished artifact, found no manifest.json"):
        loader.load(np.array([0]), 0)
    Store(task.recipe.store).copy(task.result.path, other.result.path)
    with pytest.raises(UserError, match="expected a finished artifact, found no manifest.json"):
        loader.load(np.array([0]), 0)


def test_q_that_is_not_finite_ends_the_job(small: Callable[..., BlindTask], monkeypatch: pytest.MonkeyPatch) -> None:
    build = blind_job.build_blind

    def poisoned(task: BlindTask, store: Store) -> Any:
        built = build(task, store)
        next(built.llm.parameters()).data.fill_(torch.nan)
        return built

    monkeypatch.setattr(blind_job, "build_blind", poisoned)
    with pytest.raises(UserError, match="#0: the LLM's q without the image is not finite"):
        run(small())


def test_q_that_is_not_finite_of_one_caption_spoils_no_other(
    small: Callable[..., BlindTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token without finite embedding: the caption is named with what skips it; skipped, the job goes through, the
    captions that shared its rows have the q that they have without it, and who reads it is told."""
    sound = small()
    run(sound)
    loader, _ = loader_of(sound.reader)
    ids = [set(loader.encoder(sample).input_ids.tolist()) for sample in loader.samples(np.arange(20))]
    assert loader.blind is not None
    expected = [loader.blind.scores(row) for row in range(20)]
    token, row = next((t, r) for r in range(20) for t in ids[r] if sum(t in other for other in ids) == 1)
    build = blind_job.build_blind

    def poisoned(task: BlindTask, store: Store) -> Any:
        built = build(task, store)
        embeddings = built.llm.get_input_embeddings()
        embeddings.weight = torch.nn.Parameter(embeddings.weight.clone(), requires_grad=False)  # not the head's
        embeddings.weight[token] = torch.inf
        return built

    monkeypatch.setattr(blind_job, "build_blind", poisoned)
    entry = entry_of(sound.reader.data.digest, row)
    store = Store(sound.recipe.store)
    store.delete(sound.result.path)
    with pytest.raises(
        UserError, match=f"#{row}: the LLM's q without the image is not finite;.* add '{entry}' to data.skip"
    ):
        run(sound)
    skipping = small(f"data.skip_ids=['{entry}']")
    assert skipping.result == sound.result
    run(skipping)
    blind = assembling.blind_scores(skipping.reader, store)
    assert blind is not None
    for other in set(range(20)) - {row}:
        np.testing.assert_allclose(blind.scores(other), expected[other], atol=1e-4)
    with_it = dataclasses.replace(loader, blind=blind)
    with pytest.raises(UserError, match=f"its q without the image, row {row} of .* is not finite.*{entry}"):
        with_it.load(np.array([row]), 0)
    batch = dataclasses.replace(with_it, skipped=frozenset({row})).load(np.array([row, (row + 1) % 20]), 0)
    assert batch.log_q is not None
    assert batch.log_q.isfinite().all()


# Parts of it


def test_what_has_no_image_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its q is its p: text-only conversations may be the longest texts of stage 3."""
    passed: list[TextSample] = []

    def scores(_: Any, samples: list[TextSample]) -> list[np.ndarray]:
        passed.extend(samples)
        return [np.full((2, len(sample.targets)), -1, np.float32) for sample in samples]

    monkeypatch.setattr(blind_job, "_scores", scores)
    samples = [TextSample(np.arange(n), np.arange(n), np.arange(1, n)) for n in (3, 4, 5)]
    text, *pictured = (blind_job._Text(s, n > 0, "", "", False) for n, s in enumerate(samples))
    built: Any = None
    found = blind_job._scored(built, [pictured[0], None, text, pictured[1]])
    assert passed == samples[1:]
    assert [None if x is None else x.tolist() for x in found] == [
        [[-1] * 3] * 2, None, [[0] * 2] * 2, [[-1] * 4] * 2,
    ]  # fmt: skip


def test_shards_are_shared_by_their_rows() -> None:
    assert share({0: 5, 1: 9, 2: 4, 3: 1}, 2) == [[1, 3], [0, 2]]
    assert share({4: 3}, 3) == [[4], [], []]
    assert share({}, 2) == [[], []]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 6, 12])
def test_chosen_rows_are_those_of_all_steps(num_steps: int) -> None:
    cursor = Cursor([7, 7, 7], seed=3, global_batch_size=4, window=8)
    expected = {int(r) for s in range(num_steps) for r in cursor.rows(s // 6, s % 6)}
    assert set(np.flatnonzero(chosen_rows(cursor, num_steps, 21)).tolist()) == expected


@pytest.fixture
def three(tmp_path: Path) -> tuple[BlindScores, Path]:
    """Scores of three rows, in row groups of two and one: two targets, not asked for, none."""
    rows = [np.array([[-1.5, -np.inf], [2.0, 0.0]], np.float32), None, np.zeros((2, 0), np.float32)]
    write_scores(tmp_path / file_name(0), [2, 1], rows)
    prepared = Prepared("d", 3, (("part.parquet", (2, 1)),), 0)
    return BlindScores(prepared, lambda name: tmp_path / name, "somewhere/blind-1"), tmp_path


def encoded(*target: bool) -> Encoded:
    mask = np.array(target)
    return Encoded(
        np.arange(len(mask)), mask, np.where(mask, 0, NO_TURN).astype(np.int32), np.zeros(len(mask), bool), 0
    )


def test_scores_join_their_targets(three: tuple[BlindScores, Path]) -> None:
    scores, _ = three
    sample = encoded(False, True, False, True)
    scores.join(0, sample, "set#0")
    assert sample.blind is not None
    assert sample.blind.tolist() == [[0, -1.5, 0, -np.inf], [0, 2, 0, 0]]
    scores.join(2, encoded(False, False), "set#2")
    for row, sample, found in ((0, encoded(True), "2"), (1, encoded(True), "none"), (2, encoded(True), "0")):
        with pytest.raises(
            UserError, match=rf"set#9: expected q of 1 targets, found {found} in row {row} of somewhere"
        ):
            scores.join(row, sample, "set#9")


def test_a_file_of_another_shard_is_refused(three: tuple[BlindScores, Path]) -> None:
    _, folder = three
    other = Prepared("d", 3, (("part.parquet", (1, 2)),), 0)
    with pytest.raises(UserError, match=r"shard-00000.parquet: expected q of 3 rows in 2 row groups.* found 3 in 2"):
        BlindScores(other, lambda name: folder / name, "somewhere/blind-1").scores(0)
