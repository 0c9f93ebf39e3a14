"""Does every broken sample go to the quarantine by its right reason, and nothing else with it?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.data.llava import REASONS
from dpa_ray.data.prepare import prepare
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
from tests.broken_samples import A, Q, broken, encoded, ordinary
from tests.unit.test_prepare import samples


def write(folder: Path, records: list[Any], files: dict[str, bytes]) -> SourceSection:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "set.json").write_text(json.dumps(records))
    return SourceSection(source=str(folder / "set.json"))


def test_each_broken_sample_is_named_by_its_reason_and_the_rest_is_exact(tmp_path):
    table, files = broken()
    assert len(table) > 100
    assert len({name for name, _, _ in table}) == len(table)
    records: list[Any] = []
    for i, (_, _, record) in enumerate(table):  # a good one between any two
        files[f"good/{i}.png"] = encoded("PNG", size=(i % 90 + 1, 9))
        records += [{"id": f"good{i}", "image": f"good/{i}.png", "conversations": [Q, {**A, "value": f"{i}"}]}, record]
    store = Store(str(tmp_path / "store"))
    prepared = prepare(store, write(tmp_path / "set", records, files), max_quarantined_fraction=0.5)
    lines = [json.loads(x) for x in store.read_bytes(f"{prepared.path}/quarantine.jsonl").decode().splitlines()]
    found = {line["place"]: line for line in lines}
    assert len(lines) == len(table)
    wrong = {
        name: (reason, found.get(f"set.json#{2 * i + 1}"))
        for i, (name, reason, _) in enumerate(table)
        if found.get(f"set.json#{2 * i + 1}", {}).get("reason") != reason
    }
    assert not wrong
    assert all(line["detail"] for line in lines)
    assert found["set.json#1"]["id"] == table[0][0]
    kept = samples(store, prepared)
    assert [s.id for s in kept] == [f"good{i}" for i in range(len(table))]
    assert [s.images[0].data for s in kept] == [files[f"good/{i}.png"] for i in range(len(table))]
    assert [s.turns[1].text for s in kept] == [f"{i}" for i in range(len(table))]
    counts = store.read_json(f"{prepared.path}/manifest.json")["quarantined"]
    assert counts == Counter(reason for _, reason, _ in table)
    assert set(counts) == set(REASONS), "every reason there is has a sample here"


@pytest.mark.parametrize("form", ["list", "list with BOM", "lines", "lines with BOM and CRLF"])
def test_ordinary_variety_is_no_reason(tmp_path, form):
    table, files = ordinary()
    section = write(tmp_path / "set", [record for _, record in table], files)
    mark = b"\xef\xbb\xbf" if "BOM" in form else b""
    if "list" in form:
        Path(section.source).write_bytes(mark + Path(section.source).read_bytes())
    else:
        end = "\r\n" if "CRLF" in form else "\n"
        Path(section.source).write_bytes(mark + end.join(json.dumps(record) for _, record in table).encode())
    store = Store(str(tmp_path / "store"))
    prepared = prepare(store, section, max_quarantined_fraction=0.9)
    refused = [json.loads(x) for x in store.read_bytes(f"{prepared.path}/quarantine.jsonl").splitlines()]
    assert not refused
    kept = samples(store, prepared)
    assert len(kept) == len(table)
    for sample, (_, record) in zip(kept, table, strict=True):
        names = record.get("image") or []
        names = names if isinstance(names, list) else [names]
        assert [image.data for image in sample.images] == [files[name.removeprefix("./")] for name in names]
        texts = [turn.get("value", turn.get("content")) for turn in record["conversations"]]
        assert [turn.text for turn in sample.turns] == texts
