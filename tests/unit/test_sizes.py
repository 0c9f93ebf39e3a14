"""Are rows' sizes those of their samples, read in one request, or from the footers alone, within bounds?"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpa_ray.data import shards
from dpa_ray.data.prepare import prepare
from dpa_ray.data.prepared import find_prepared, mixed, sealed
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.sizes import ONE_IMAGE, Sizes, size_of
from dpa_ray.errors import UserError
from dpa_ray.store import Store
from tests.s3_proxy import running_proxy
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


def expected_of(store, data):
    """From the samples themselves, shard by shard."""
    system, root = store.arrow()
    found = []
    for shard, (name, _) in enumerate(data.shards):
        table = pq.read_table(f"{root}/{data.shard_folder(shard)}/{name}", filesystem=system)
        found += [size_of(shards.from_row(row, "")) for row in table.to_pylist()]
    return found


def without_file(data):
    """As data that was prepared before there was one."""
    return dataclasses.replace(data, sizes=("",) * len(data.shards))


def test_sizes_are_those_of_the_samples(store_and_data):
    store, data = store_and_data
    assert len(data.shards) == 3
    expected = expected_of(store, data)
    assert list(store.read_bytes(f"{data.path}/sizes.uint8")) == expected
    rows = np.array([19, 0, 7, 8, 13, 0])
    for cache_bytes in (0, 9, 10**6):
        for found in (data, without_file(data), dataclasses.replace(data, sizes=())):
            sizes = Sizes(store, found, cache_bytes)
            for _ in range(2):
                assert sizes(rows).tolist() == [expected[row] for row in rows]
            assert sizes._cached_bytes <= cache_bytes
        copy = pickle.loads(pickle.dumps(sizes))
        assert copy(rows).tolist() == sizes(rows).tolist()


def test_data_whose_manifest_names_no_file_is_read_by_its_footers(store_and_data):
    store, data = store_and_data
    path = f"{data.path}/manifest.json"
    manifest = {name: value for name, value in store.read_json(path).items() if name not in ("sizes", "sha256")}
    store.write_json(path, sealed(manifest))
    store.delete(f"{data.path}/sizes.uint8")
    found = find_prepared(store, data.digest)
    assert found == without_file(data)
    assert Sizes(store, found)(np.arange(20)).tolist() == expected_of(store, data)


def test_a_mixture_has_each_source_s_own(store_and_data, tmp_path):
    """One twice, one once; one of the two as it was prepared before."""
    store, data = store_and_data
    other = prepare(store, make(tmp_path / "other", [record(i) for i in range(11)]), max_quarantined_fraction=0)
    for parts in ([(data, 2), (other, 1)], [(other, 1), (data, 2)], [(without_file(data), 2), (other, 1)]):
        mixture = mixed("m", parts)
        sizes, rows = Sizes(store, mixture), np.random.default_rng(0).permutation(51)
        assert sizes(rows).tolist() == np.array(expected_of(store, mixture))[rows].tolist()


def test_all_sizes_of_a_source_are_one_request(store_and_data, rclone_s3, monkeypatch):
    """The footers were a HEAD and a GET for each shard."""
    local, data = store_and_data
    with running_proxy(int(rclone_s3.env["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        store = Store(f"{rclone_s3.uri}/store")
        store.upload(Path(local.uri), "", local.list(""))
        found = {}
        for name, prepared in (("file", data), ("footers", without_file(data))):
            sizes = Sizes(store, prepared)
            proxy.seen.clear()
            found[name] = [sizes(np.arange(start, start + 10)).tolist() for start in (0, 10)]
            found[f"{name}, requests"] = [method for method, path in proxy.seen if "/data/" in path]
    assert found["file"] == found["footers"]
    assert found["file, requests"] == ["GET"]
    assert sorted(found["footers, requests"]) == ["GET"] * 3 + ["HEAD"] * 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, "expected the sizes of 20 rows, found no file"),
        (lambda data: data[:-1], "expected the sizes of 20 rows, found 19 bytes"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    ],
    ids=["missing", "short", "a flipped bit"],
)
def test_a_file_that_is_not_what_was_written_is_told(store_and_data, damage, message):
    store, data = store_and_data
    path = f"{data.path}/sizes.uint8"
    left = damage(store.read_bytes(path))
    store.delete(path) if left is None else store.write_bytes(path, left)
    with pytest.raises(UserError, match=rf"{path}: {message}; delete .* to have the data prepared again"):
        Sizes(store, data)(np.array([3]))


@pytest.mark.parametrize("sizes", [{"name": "../x"}, {"size_bytes": 19}, {"sha256": None}, None], ids=str)
def test_a_manifest_that_names_another_file_is_refused(store_and_data, sizes):
    store, data = store_and_data
    path = f"{data.path}/manifest.json"
    manifest = {name: value for name, value in store.read_json(path).items() if name != "sha256"}
    manifest["sizes"] = sizes and {**manifest["sizes"], **sizes}
    store.write_json(path, sealed(manifest))
    with pytest.raises(UserError, match=r"manifest.json: expected a manifest of schema 1"):
        find_prepared(store, data.digest)


def test_a_shard_without_sizes_is_told_and_what_to_do(store_and_data):
    store, data = store_and_data
    system, root = store.arrow()
    path = f"{root}/{data.path}/{data.shards[1][0]}"
    table = pq.read_table(path, filesystem=system)
    pq.write_table(table, path, filesystem=system)
    with pytest.raises(
        UserError, match=r"expected the sizes of 8 rows in its footer, found 0; delete .* prepared again"
    ):
        Sizes(store, dataclasses.replace(without_file(data), footers=("", "", "")))(np.array([9]))
