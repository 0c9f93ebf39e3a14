"""Is a batch exactly its rows' samples, and does the stream give the same batches, in order, ahead of its consumer?"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlavaImageProcessorPil

from dpa_ray.batch import IGNORE_INDEX, Arrays, Batch
from dpa_ray.data import ingest, shards
from dpa_ray.data.cursor import Cursor, shares
from dpa_ray.data.images import decode
from dpa_ray.data.ingest import Loader, stream
from dpa_ray.data.pixels import levels, pixels
from dpa_ray.data.prepare import prepare
from dpa_ray.errors import UserError
from dpa_ray.store import Store
from tests.encoders import NUM_IMAGE_TOKENS, encoder, style
from tests.unit.test_sources import make, record

PROCESSOR = LlavaImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)


def prepared_loader(folder: Path, records: list[Any], *, store: Store | None = None, template: Any = "chat") -> Loader:
    store = store or Store(str(folder / "store"))
    prepared = prepare(store, make(folder, records), max_quarantined_fraction=0)
    tokenizer = style("qwen2.5")[0]
    return Loader(store, prepared, encoder(tokenizer, template), PROCESSOR if template != "text" else None, 0)


def text_only(i: int) -> dict[str, Any]:
    return record(i, image=None, conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"Ho {i}"}])


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """100 samples, every tenth without an image, in small row groups and three shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MAX_GROUP_ROWS", 8)
        patch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 40)
        records = [text_only(i) if i % 10 == 4 else record(i) for i in range(100)]
        return prepared_loader(tmp_path_factory.mktemp("ingest"), records)


def equal(one: Batch, two: Batch) -> bool:
    return all(
        torch.equal(value, getattr(two, name)) if isinstance(value, torch.Tensor) else value == getattr(two, name)
        for name, value in vars(one).items()
    )


# -- load


def test_a_batch_is_its_rows_samples_in_their_order(loader):
    rows = np.array([99, 0, 54, 13])
    batch = loader.load(rows, 0)
    assert batch.rows == [(loader.prepared.digest, int(row)) for row in rows]
    assert batch.ids == ["r99", "r0", "r54", "r13"]
    samples = loader.samples(rows)
    assert [s.place for s in samples] == [f"set.json#{row}" for row in rows]
    for b, sample in enumerate(samples):
        encoded = loader.encoder(sample)
        length = len(encoded.input_ids)
        assert batch.input_ids[b, :length].tolist() == encoded.input_ids.tolist()
        assert batch.attention_mask[b].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        expected = np.where(encoded.target, encoded.input_ids, IGNORE_INDEX)
        assert batch.labels[b, :length].tolist() == expected.tolist()
        assert int(batch.image_mask[b].sum()) == NUM_IMAGE_TOKENS * len(sample.images)
    images = [image for sample in samples for image in sample.images]
    assert len(images) == 3
    assert np.array_equal(batch.pixel_values.numpy(), [levels(decode(i.data), PROCESSOR) for i in images])
    shown = batch.to("cpu").pixel_values
    assert shown.dtype == torch.float32
    assert np.array_equal(shown.numpy(), [pixels(decode(i.data), PROCESSOR) for i in images])
    assert batch.num_samples == 4
    assert batch.num_tokens == int(batch.attention_mask.sum())
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum()) > 0


def test_a_text_only_batch_has_no_pixels_but_their_shape(loader):
    batch = loader.load(np.array([4, 14]), 0)
    assert batch.pixel_values.shape == (0, 3, 8, 8)
    assert not batch.image_mask.any()


def test_filler_is_the_named_row_without_targets_and_in_no_count(loader):
    filler, real = loader.load(np.array([], np.int64), 7), loader.load(np.array([7]), 0)
    assert torch.equal(filler.input_ids, real.input_ids)
    assert torch.equal(filler.pixel_values, real.pixel_values)
    assert filler.labels.eq(IGNORE_INDEX).all()
    assert (filler.num_samples, filler.num_tokens, filler.num_targets, filler.rows, filler.ids) == (0, 0, 0, [], [])


def test_stage_1_batches_have_no_images(tmp_path):
    batch = prepared_loader(tmp_path, [record(i) for i in range(3)], template="text").load(np.arange(3), 0)
    assert batch.pixel_values.shape == (0, 3, 0, 0)
    assert not batch.image_mask.any()


def test_packed_batches_hold_the_same_samples_without_padding(tmp_path):
    """Through the encoder: ids, targets, counts and identities; one sample is cut at max_length."""
    captions = [f"A {'very ' * (7 * i % 23)}red square." for i in range(8)]
    records = [
        record(i, conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": c}])
        for i, c in enumerate(captions)
    ]
    unpacked = prepared_loader(tmp_path, records, template="text")
    unpacked.encoder.max_length = 40
    packed = replace(unpacked, packing=True)
    one, two = (loader.load(np.arange(8), 0) for loader in (unpacked, packed))
    assert two.sample is not None
    assert two.input_ids.numel() < one.input_ids.numel()
    assert one.attention_mask.sum(1).max() == 40
    assert (one.num_tokens, one.num_targets, one.rows, one.ids) == (two.num_tokens, two.num_targets, two.rows, two.ids)
    for number in range(8):
        mine, theirs = two.sample == number, one.attention_mask[number].bool()
        for name in ("input_ids", "labels", "turn"):
            assert getattr(two, name)[mine].tolist() == getattr(one, name)[number][theirs].tolist()
    filler = packed.load(np.array([], np.int64), 3)
    assert (filler.num_tokens, filler.num_targets) == (0, 0)


def test_an_image_that_truncation_drops_gives_no_pixels(tmp_path):
    turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Yes"}]
    made = prepared_loader(tmp_path, [record(0, image=["im/0.png", "im/1.png"], conversations=turns)])
    whole = made.load(np.array([0]), 0)
    image = int(whole.image_mask[0].nonzero()[NUM_IMAGE_TOKENS])
    made.encoder.max_length = image + 1
    cut = made.load(np.array([0]), 0)
    assert torch.equal(cut.pixel_values, whole.pixel_values[:1])
    assert int(cut.image_mask.sum()) == NUM_IMAGE_TOKENS


@pytest.mark.parametrize("row", [-1, 100])
def test_a_row_that_is_not_there_is_an_error(loader, row):
    with pytest.raises(IndexError, match=r"expected a row in 0..99"):
        loader.load(np.array([row]), 0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on, by their place in their shard."""
    indices: list[int] = []
    inner = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, index: int, **options: Any) -> Any:
        indices.append(index)
        return inner(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return indices


def test_seeking_to_a_step_reads_nothing_of_what_it_skips(loader, taken):
    """Row groups of a step in the middle, asked for first, are those of its rows; a walk there opens more."""
    cursor = Cursor(loader.prepared.row_groups, seed=3, global_batch_size=5, window=10)
    ends = np.cumsum(loader.prepared.row_groups)
    costs = []
    for step in (0, 11, cursor.steps_per_epoch - 1):
        rows = cursor.rows(1, step)
        pickle.loads(pickle.dumps(loader)).load(rows, 0)  # a new process
        assert len(taken) == len(set(np.searchsorted(ends, rows, side="right").tolist()))
        costs.append(len(taken))
        taken.clear()
    walker = pickle.loads(pickle.dumps(loader))
    for step in range(cursor.steps_per_epoch):
        walker.load(cursor.rows(1, step), 0)
    assert len(taken) > max(costs)


def test_only_the_row_groups_needed_are_read_and_kept_within_bounds(loader, taken):
    fresh = pickle.loads(pickle.dumps(loader))
    fresh.load(np.array([0, 7, 3, 41]), 0)
    assert sorted(taken) == [0, 0], "one row group of each of two shards"
    fresh.load(np.array([1, 42]), 0)
    assert len(taken) == 2
    fresh.cache_bytes = 1
    fresh._reader = None
    taken.clear()
    for row in (0, 9, 0, 9):
        fresh.load(np.array([row]), 0)
    assert taken == [0, 1, 0, 1]


def test_all_samples_come_out_once_by_the_cursors_order(loader):
    cursor = Cursor(loader.prepared.row_groups, seed=1, global_batch_size=7, window=20)
    ids = [
        sample.id
        for step in range(cursor.steps_per_epoch)
        for rank in shares(cursor.rows(0, step), 2, 4)
        for rows in rank
        for sample in loader.samples(rows)
    ]
    assert sorted(ids, key=lambda i: int(i[1:])) == [f"r{i}" for i in range(100)]


# -- damage


def test_a_shard_of_another_size_is_told(tmp_path):
    made = prepared_loader(tmp_path, [record(i) for i in range(3)])
    path = Path(made.store.url(f"{made.prepared.path}/part-00000.parquet"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = rf"part-00000.parquet: expected {len(whole)} bytes, found {len(whole) - 1}; delete .* prepared again"
    with pytest.raises(UserError, match=message):
        made.load(np.array([1]), 0)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet: expected .* bytes, found no file"):
        made.load(np.array([1]), 0)


def test_a_shard_with_other_bytes_is_told(tmp_path):
    made = prepared_loader(tmp_path, [record(i) for i in range(3)])
    path = Path(made.store.url(f"{made.prepared.path}/part-00000.parquet"))
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"part-00000.parquet.*(cannot be read|does not decode|expected)"):
        made.load(np.array([0]), 0)


def test_no_flipped_bit_of_a_shard_is_trained_on(tmp_path):
    """At random places all over the file: page headers, texts, images, footer."""
    made = prepared_loader(tmp_path, [record(i) for i in range(6)])
    path = Path(made.store.url(f"{made.prepared.path}/part-00000.parquet"))
    whole = path.read_bytes()
    expected = made.samples(range(6))
    rng = np.random.default_rng(0)
    places = [
        *rng.integers(4, len(whole), 150),
        len(whole) - 1,
        len(whole) - 5,
        whole.index(expected[0].turns[1].text.encode()),
    ]
    unseen = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        made._reader = None
        try:
            assert made.samples(range(6)) == expected, f"byte {place} was taken as it is"
            unseen += 1  # it says nothing: unused bits of a page's header, for one
        except UserError as err:
            assert str(err).startswith(str(path)), err
            assert "prepared again" in str(err), err
    assert unseen < len(places) / 10


def test_a_template_that_refuses_the_data_is_told_before_the_run(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, *record(0)["conversations"]]
    made = prepared_loader(tmp_path, [record(0), record(1, conversations=turns)])
    made.check()
    made.encoder = encoder(style("gemma-2")[0])
    with pytest.raises(UserError, match="refuses"):
        made.check()


# -- from S3


def test_shards_on_s3_give_the_same_batches(tmp_path, s3_server):
    records = [record(i) for i in range(10)]
    local = prepared_loader(tmp_path, records)
    remote = prepared_loader(tmp_path, records, store=Store(f"{s3_server.uri}/store"))
    rows = np.array([7, 2, 9])
    assert equal(local.load(rows, 0), remote.load(rows, 0))


# -- stream


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def micro_batches(loader: Loader, rank: int, world_size: int = 2) -> list[tuple[np.ndarray, int]]:
    cursor = Cursor(loader.prepared.row_groups, seed=1, global_batch_size=7, window=20)
    steps = [cursor.rows(0, step) for step in range(cursor.steps_per_epoch)]
    return [(rows, int(step[0])) for step in steps for rows in shares(step, world_size, 3)[rank]]


@pytest.mark.parametrize("block_bytes", [2**22, 1], ids=["blocks of 8", "blocks of 1"])
def test_the_stream_gives_what_loads_give_in_order(loader, local_ray, monkeypatch, block_bytes):
    monkeypatch.setattr(ingest, "BLOCK_BYTES", block_bytes)
    wanted = micro_batches(loader, rank=1)
    assert any(len(rows) == 0 for rows, _ in wanted), "with filler"
    found = list(stream(loader, wanted, prefetch=2, workers=2))
    assert len(found) == len(wanted)
    assert all(equal(batch, loader.load(*micro)) for batch, micro in zip(found, wanted, strict=True))


def test_resuming_is_a_shorter_list(loader, local_ray):
    wanted = micro_batches(loader, rank=0)
    whole = list(stream(loader, wanted, prefetch=1, workers=2))
    again = list(stream(loader, wanted[11:], prefetch=3, workers=1))
    assert len(again) == len(whole) - 11
    assert all(equal(one, two) for one, two in zip(whole[11:], again, strict=True))


def test_nothing_to_stream_is_nothing(loader, local_ray):
    assert list(stream(loader, [], prefetch=2, workers=2)) == []


class Counting(Loader):
    """Leaves a file for each load, and one for each process that got a loader."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (Path(self.store.url("log")) / f"process-{os.getpid()}-{time.monotonic_ns()}").touch()

    def arrays(self, rows: np.ndarray, filler_row: int) -> Arrays:
        (Path(self.store.url("log")) / f"load-{time.monotonic_ns()}").touch()
        return super().arrays(rows, filler_row)


def counting_loader(folder: Path) -> Counting:
    base = prepared_loader(folder, [record(i) for i in range(20)])
    base.encoder.max_length = 64  # what is made ahead is bounded in bytes, by an estimate from the shapes
    return Counting(base.store, base.prepared, base.encoder, base.image_processor, 0)


def test_it_runs_ahead_within_bounds_and_ships_the_loader_once_per_process(tmp_path, local_ray, monkeypatch):
    monkeypatch.setattr(ingest, "BLOCK_BYTES", 1)
    counting = counting_loader(tmp_path)
    log = Path(counting.store.url("log"))
    log.mkdir()
    wanted = [(np.array([i % 20]), 0) for i in range(60)]
    batches = stream(counting, wanted, prefetch=2, workers=2)
    next(batches)
    time.sleep(3)
    ahead = len(list(log.glob("load-*")))
    assert 3 <= ahead <= 30, "some are ready, most are not made"
    assert sum(1 for _ in batches) == 59
    assert sum(1 for _ in stream(counting_loader(tmp_path), wanted, prefetch=2, workers=2)) == 60, "another rank's"
    processes = [path.name.split("-")[1] for path in log.glob("process-*")]
    assert len(processes) == len(set(processes)) <= 4


def test_it_asks_for_micro_batches_only_as_far_as_it_needs_them(tmp_path, local_ray):
    """A hundred million samples are as many micro-batches as one has patience for: none is laid out before its time."""
    loader, asked = prepared_loader(tmp_path, [record(i) for i in range(20)]), 0

    def endless() -> Iterator[tuple[np.ndarray, int]]:
        nonlocal asked
        while True:
            asked += 1
            yield np.array([asked % 20]), 0

    batches = stream(loader, endless(), prefetch=2, workers=2)
    rows = [next(batches).rows[0][1] for _ in range(5)]
    batches.close()
    assert rows == [1, 2, 3, 4, 5]
    assert asked <= 2 + (5 + 2 + 2) * ingest.MAX_BLOCK_BATCHES


def test_stopping_early_stops_the_tasks(tmp_path, local_ray, monkeypatch):
    monkeypatch.setattr(ingest, "BLOCK_BYTES", 1)
    base = prepared_loader(tmp_path, [record(i) for i in range(20)])
    log = Path(base.store.url("log"))
    log.mkdir()
    counting = Counting(base.store, base.prepared, base.encoder, base.image_processor, 0)
    batches = stream(counting, [(np.array([0]), 0)] * 300, prefetch=2, workers=2)
    next(batches)
    batches.close()
    time.sleep(1)
    made = len(list(log.glob("load-*")))
    time.sleep(1)
    assert len(list(log.glob("load-*"))) == made < 100


def test_an_error_in_a_task_is_its_message_alone(tmp_path, local_ray, capfd, caplog):
    made = prepared_loader(tmp_path, [record(i) for i in range(3)])
    Path(made.store.url(f"{made.prepared.path}/part-00000.parquet")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"part-00000.parquet: expected \d+ bytes, found 1; delete") as caught:
        list(stream(made, [(np.array([1]), 0)], prefetch=1, workers=1))
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("ray")]


def test_ray_says_nothing(loader, local_ray, capfd):
    list(stream(loader, micro_batches(loader, rank=0)[:3], prefetch=1, workers=1))
    captured = capfd.readouterr()
    assert captured.out.strip() == ""
    assert "Running" not in captured.err
    assert "Execution" not in captured.err


def test_without_ray_it_says_so(loader, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="Ray to be initialised"):
        next(stream(loader, [(np.array([0]), 0)], prefetch=1, workers=1))
