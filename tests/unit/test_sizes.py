"""Are rows' sizes those of their samples, read from the footers alone, within bounds?"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpa_ray.data import shards
from dpa_ray.data.prepare import prepare
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.sizes import ONE_IMAGE, Sizes, size_of
from dpa_ray.errors import UserError
from dpa_ray.store import Store
from tests.unit.test_ingest import text_only
from tests.unit.test_sources import make, record


def sample(num_images, num_characters):
    images = [ImageFile("x.png", b"")] * num_images
    return Sample(None, "here", [Turn("human", ""), Turn("gpt", "a" * num_characters)], images)


def test_by_hand():
    assert size_of(sample(0, 0)) == 0
    assert size_of(sample(0, 3)) == 8  # 4 log2(1 + 3)
    assert size_of(sample(1, 1023)) == ONE_IMAGE + 40
    assert size_of(sample(2, 10**6)) == 3 * ONE_IMAGE - 1
    assert size_of(sample(9, 0)) == 3 * ONE_IMAGE


@pytest.fixture
def store_and_data(tmp_path, monkeypatch):
    monkeypatch.setattr("dpa_ray.data.sources.MAX_PART_ROWS", 8)
    store = Store(str(tmp_path / "store"))
    records = [text_only(10**i) if i % 3 else record(i) for i in range(20)]
    return store, prepare(store, make(tmp_path, records), max_quarantined_fraction=0)


def test_sizes_are_those_of_the_samples(store_and_data):
    store, data = store_and_data
    assert len(data.shards) == 3
    system, root = store.arrow()
    expected = []
    for name, _ in data.shards:
        table = pq.read_table(f"{root}/{data.path}/{name}", filesystem=system)
        expected += [size_of(shards.from_row(row, "")) for row in table.to_pylist()]
    rows = np.array([19, 0, 7, 8, 13, 0])
    for cache_bytes in (0, 9, 10**6):
        sizes = Sizes(store, data, cache_bytes)
        for _ in range(2):
            assert sizes(rows).tolist() == [expected[row] for row in rows]
        assert sizes._cached_bytes <= cache_bytes


def test_a_shard_without_sizes_is_told_and_what_to_do(store_and_data):
    store, data = store_and_data
    system, root = store.arrow()
    path = f"{root}/{data.path}/{data.shards[1][0]}"
    table = pq.read_table(path, filesystem=system)
    pq.write_table(table, path, filesystem=system)
    with pytest.raises(
        UserError, match=r"expected the sizes of 8 rows in its footer, found 0; delete .* prepared again"
    ):
        Sizes(store, dataclasses.replace(data, footers=("", "", "")))(np.array([9]))
