"""Is a mixture exactly what it says, made of sources that are prepared once and read where they lie?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.data import prepare as module
from dpa_ray.data import sources
from dpa_ray.data.catalog import pieces, source_digest
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.ingest import CACHE_BYTES, _Reader
from dpa_ray.data.prepare import find_prepared, prepare
from dpa_ray.data.prepared import Prepared
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceEntry, SourceOptions, SourceSection
from dpa_ray.store import Store
from tests.unit.test_parquet import captions
from tests.unit.test_sources import make, png, record
from tests.unit.test_webdataset import pairs, tar


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    """100 records."""
    return str(make(tmp_path / "json", [record(i) for i in range(100)]).source)


def mix(*entries: dict[str, Any]) -> SourceSection:
    return SourceSection(source=[SourceEntry(**entry) for entry in entries])


def run(store: Store, section: SourceSection) -> Prepared:
    return prepare(store, section, max_quarantined_fraction=0)


def ids(store: Store, prepared: Prepared) -> list[str | None]:
    reader = _Reader(store, prepared, CACHE_BYTES)
    return [sample.id for sample in reader.samples(range(prepared.num_rows))]


def taken(store: Store, source: str, take: str, **keys: Any) -> list[int]:
    found = ids(store, run(store, mix({"source": source, "take": take, **keys})))
    return [int(str(name)[1:]) for name in found]


@pytest.mark.parametrize("parts", [1, 7])
def test_take_is_exactly_the_rows_it_says(store, source, parts, monkeypatch):
    if parts > 1:
        monkeypatch.setattr(sources, "MAX_PART_ROWS", 15)
    assert taken(store, source, "first:30") == list(range(30))
    assert taken(store, source, "first:2%") == [0, 1]
    assert taken(store, source, "first:2.4%") == [0, 1]
    assert taken(store, source, "first:2.5%") == [0, 1, 2], "the nearest"
    assert taken(store, source, "last:3") == taken(store, source, "end:3") == [97, 98, 99]
    some = taken(store, source, "random:10%")
    assert some == taken(store, source, "random:10") == sorted(set(some))
    assert len(some) == 10
    assert max(b - a for a, b in zip(some, some[1:], strict=False)) < 60, "spread, not a stretch"
    assert taken(store, source, "first:1000") == list(range(100)), "at most what is there"


def test_taking_all_of_it_is_the_source_itself(source):
    whole = source_digest(SourceSection(source=source))
    assert (
        source_digest(mix({"source": source})) == source_digest(mix({"source": source, "take": "first:100%"})) == whole
    )
    digests = [source_digest(mix({"source": source, "take": take})) for take in ("first:50", "last:50", "random:50%")]
    assert len({whole, *digests}) == 4
    assert digests[0] == source_digest(mix({"source": source, "take": "first:50%"}))


def test_weight_is_how_often_a_sample_comes_in_an_epoch(store, source, tmp_path):
    other = str(tar(tmp_path / "a.tar", pairs(0, 10)))
    prepared = run(store, mix({"source": source, "weight": 0.5}, {"source": other, "weight": 2.3}))
    assert prepared.num_rows == 50 + 20 + 3
    counts = Counter(ids(store, prepared))
    assert sorted(counts[f"{i:04}"] for i in range(10)) == [2] * 7 + [3] * 3
    assert sum(counts[f"r{i}"] == 1 for i in range(100)) == 50
    assert find_prepared(store, prepared.digest) == prepared
    cursor = Cursor(prepared.row_groups, seed=1, global_batch_size=9, window=20)
    rows = [int(row) for step in range(cursor.steps_per_epoch) for row in cursor.rows(0, step)]
    assert sorted(rows) == list(range(73))


def test_samples_of_a_mixture_keep_their_place_and_bytes(store, source, tmp_path):
    tar_source, parquet = tar(tmp_path / "a.tar", pairs(3, 5)), captions(tmp_path / "b.parquet", 7, 9)
    shapes = {"source": "builtin:shapes", "options": SourceOptions(size=2)}
    section = mix({"source": source, "take": "last:1"}, {"source": str(tar_source)}, {"source": str(parquet)}, shapes)
    prepared = run(store, section)
    reader = _Reader(store, prepared, CACHE_BYTES)
    found = reader.samples(range(prepared.num_rows))
    assert [s.place for s in found][:5] == ["set.json#99", "a.tar#0003", "a.tar#0004", "b.parquet#0", "b.parquet#1"]
    assert [s.images[0].data for s in found[:5]] == [png(0), png(3), png(4), png(7), png(8)]
    assert len(found) == 7


def test_an_entry_is_prepared_once_whatever_it_is_mixed_with(store, source, tmp_path, monkeypatch):
    other = str(tar(tmp_path / "a.tar", pairs(0, 10)))
    first = run(store, mix({"source": source}, {"source": other}))
    made: list[str] = []
    inner = module.prepare_part
    monkeypatch.setattr(module, "prepare_part", lambda *a: (made.append(a[2]), inner(*a))[1])
    again = run(store, mix({"source": source}, {"source": other, "weight": 3}))
    assert run(store, SourceSection(source=source)).num_rows == 100
    assert made == []
    assert again.digest != first.digest
    changed = run(store, mix({"source": source}, {"source": other, "take": "first:5"}))
    assert (len(made), changed.num_rows) == (1, 105)


def test_a_mixture_of_which_a_source_is_gone_is_prepared_again(store, source, tmp_path):
    section = mix({"source": source}, {"source": str(tar(tmp_path / "a.tar", pairs(0, 10)))})
    prepared = run(store, section)
    store.delete(f"data/{pieces(section)[1].scan.digest}")
    assert find_prepared(store, prepared.digest) is None
    assert run(store, section) == prepared


def test_the_digest_depends_on_the_entries_and_their_order_alone(source, tmp_path):
    other = str(tar(tmp_path / "a.tar", pairs(0, 10)))
    a, b = {"source": source}, {"source": other}
    moved = str(tar(tmp_path / "elsewhere" / "c.tar", pairs(0, 10)))
    assert source_digest(mix(a, b)) == source_digest(mix(a, {"source": moved}))
    digests = {source_digest(mix(*e)) for e in ((a, b), (b, a), (a,), (a, a), (a, {**b, "weight": 2.0}))}
    assert len(digests) == 5


# -- a mixture in a file


def test_a_mixture_file_of_llava_next_is_what_its_entries_say(store, source, tmp_path):
    tar(tmp_path / "json" / "a.tar", pairs(0, 4))
    text = f"""
datasets:
  - json_path: {source}
    sampling_strategy: first:3
  - json_path: set.json  # relative to this file
    sampling_strategy: "end:2%"
  - {{json_path: set.json, sampling_strategy: "random:10%"}}
  - {{json_path: set.json, sampling_strategy: all}}
  - {{source: a.tar, weight: 2}}
"""
    path = tmp_path / "json" / "mix.yaml"
    path.write_text(text)
    prepared = run(store, SourceSection(source=str(path), images=str(tmp_path / "json")))
    found = ids(store, prepared)
    assert len(found) == 3 + 2 + 10 + 100 + 8
    assert found[:5] == ["r0", "r1", "r2", "r98", "r99"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected datasets:"),
        ("datasets: []", "expected datasets:"),
        ("datasets: [", "not readable as YAML"),
        ("datasets: [{json: a.json}]", r"datasets.0: expected an entry with json_path \(or source\)"),
        ("datasets: [{json_path: a.json, strategy: all}]", "datasets.0: expected keys out of .*, found strategy"),
        (
            "datasets: [{json_path: a.json, sampling_strategy: 'some:3'}]",
            "datasets.0: take: expected first:N, .*, found 'some:3'$",
        ),
        (
            "datasets: [{json_path: a.json, weight: half}]",
            "datasets.0: weight: expected a number, found string 'half'$",
        ),
        ("datasets: [{source: a.tar, columns: {imge: x}}]", r"datasets.0: columns.imge: .*did you mean image\?"),
        ("datasets: [{json_path: b.yaml}]", "datasets.0: .*found another mixture"),
        ("datasets: [{json_path: none.json}]", "expected a file at .*none.json, found nothing"),
    ],
)
def test_a_mixture_file_that_is_wrong_is_told(tmp_path, text, message):
    (tmp_path / "mix.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        source_digest(SourceSection(source=str(tmp_path / "mix.yml")))
