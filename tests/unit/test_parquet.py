"""Do Parquet files in the layout of HF datasets, and plainer ones, come out exactly?"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpa_ray.data import parquet, sources
from dpa_ray.data.catalog import open_source, source_digest
from dpa_ray.data.prepare import prepare
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import Rejected
from dpa_ray.errors import UserError
from dpa_ray.recipe import ColumnsSection, SourceSection
from dpa_ray.store import Store
from tests.unit.test_sources import png, read, upload
from tests.unit.test_webdataset import shown

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It — 東京."}]


def write(path: Path, columns: dict[str, Any], group_rows: int = 1000, **types: pa.DataType) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def captions(path: Path, start: int, stop: int, group_rows: int = 1000) -> Path:
    rows = range(start, stop)
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in rows]
    columns = {"image": images, "caption": [f"caption {i}" for i in rows], "id": list(rows)}
    return write(path, columns, group_rows, image=IMAGE)


def section(source: Any, **keys: Any) -> SourceSection:
    return SourceSection(source=str(source), **keys)


def test_captions_with_image_structs_come_out_exactly(tmp_path):
    found = read(section(captions(tmp_path / "a.parquet", 3, 6)))
    assert [shown(s) for s in found] == [
        (str(i), ["<image>", f"caption {i}"], [(f"{i}.png", png(i))]) for i in (3, 4, 5)
    ]
    assert [s.place for s in found] == ["#0", "#1", "#2"]


def test_conversations_messages_lists_and_text_alone_come_out_exactly(tmp_path):
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]
    alone = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    images = [[{"bytes": png(1), "path": None}], [{"bytes": png(2), "path": "/abs/x.png"}] * 2, None]
    path = write(
        tmp_path / "a.parquet", {"images": images, "conversations": [TURNS, two, alone]}, images=pa.list_(IMAGE)
    )
    assert [shown(s) for s in read(section(path))] == [
        (None, ["<image>\nWhat?", "It — 東京."], [("image-0", png(1))]),
        (None, ["<image> or <image>?", "Both."], [("x.png", png(2)), ("x.png", png(2))]),
        (None, ["Hi", "Ho"], []),
    ]
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It."}]},
    ]
    path = write(tmp_path / "b.parquet", {"image": [png(3)], "messages": [messages]})
    assert shown(read(section(path))[0]) == (None, ["<image>\nWhat?", "It."], [("image-0", png(3))])
    path = write(tmp_path / "c.parquet", {"image": [png(3)], "conversations": [json.dumps(TURNS)]})
    assert shown(read(section(path))[0])[1] == ["<image>\nWhat?", "It — 東京."]


def test_columns_name_what_is_what(tmp_path):
    path = write(tmp_path / "a.parquet", {"pic": [png(1)], "q": ["Q?"], "a": ["A."], "text": ["other"], "n": [5]})
    columns = ColumnsSection(image="pic", prompt="q", text="a", id="n")
    assert shown(read(section(path, columns=columns))[0]) == ("5", ["<image>\nQ?", "A."], [("image-0", png(1))])
    assert shown(read(section(path))[0]) == (None, ["", "other"], [])


def test_paths_without_bytes_are_read_from_the_images_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "1.png").write_bytes(png(1))
    images = [{"bytes": None, "path": "1.png"}, {"bytes": None, "path": "none.png"}, {"bytes": png(2), "path": "2.png"}]
    images += [{"bytes": None, "path": "../pictures/1.png"}, {"bytes": None, "path": "/etc/x.png"}, None]
    path = write(tmp_path / "a.parquet", {"image": images, "text": list("abcdef")}, image=IMAGE)
    found = read(section(path, images=str(folder)))
    assert [getattr(s, "reason", None) for s in found] == [
        None, "image_missing", None, "unsafe_image_name", "unsafe_image_name", None,
    ]  # fmt: skip
    assert [i.data for s in (found[0], found[2], found[5]) if isinstance(s, Sample) for i in s.images] == [
        png(1),
        png(2),
    ]
    before = source_digest(section(path, images=str(folder)))
    (folder / "1.png").write_bytes(png(1) + b"x")
    assert source_digest(section(path, images=str(folder))) != before
    with pytest.raises(UserError, match="expected a folder of images at .*none"):
        source_digest(section(path, images=str(tmp_path / "none")))
    plain = write(folder / "b.parquet", {"image": ["1.png"], "text": ["a"]})
    assert shown(read(section(plain))[0])[2] == [("1.png", png(1) + b"x")]


def test_bad_rows_are_told_by_their_reason_and_the_rest_comes_through(tmp_path):
    images = [png(1), b"", png()[:40], b"<html>", png(2), png(3)]
    texts = ["a", "b", "c", "d", None, "an <image> here"]
    path = write(
        tmp_path / "a.parquet",
        {"image": [{"bytes": b, "path": None} for b in images] + [{"bytes": None, "path": None}], "text": [*texts, "g"],
         "id": list("abcdefg")},
        image=IMAGE,
    )  # fmt: skip
    found = read(section(path))
    reasons = [
        "image_empty",
        "image_truncated",
        "image_not_an_image",
        "no_assistant_text",
        "image_count",
        "image_missing",
    ]
    assert [getattr(s, "reason", None) for s in found] == [None, *reasons]
    assert all(isinstance(bad, Rejected) and bad.id == "abcdefg"[i] for i, bad in enumerate(found[1:], 1))


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        (
            {"image": [b"x"], "label": ["x"]},
            None,
            "expected a column conversations or messages or .*found image, label",
        ),
        ({"text": ["x"], "caption": ["x"]}, None, "found caption and text: name one by columns"),
        ({"text": ["x"]}, {"text": "body"}, r"expected a column 'body' \(columns.text\), found text"),
        ({"text": [["x"]]}, None, "expected texts in the column 'text', found list"),
        ({"text": pa.array([], pa.string())}, None, "expected rows, found none"),
    ],
)
def test_columns_that_cannot_be_told_are_an_error(tmp_path, columns, named, message):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=message):
        source_digest(section(path, columns=named and ColumnsSection(**named)))


def test_what_is_no_parquet_is_told(tmp_path):
    whole = captions(tmp_path / "a.parquet", 0, 5).read_bytes()
    for data in (b"", b"x" * 100, whole[:-20]):
        (tmp_path / "b.parquet").write_bytes(data)
        with pytest.raises(UserError, match=r"b.parquet: expected Parquet, found a file that cannot be read"):
            source_digest(section(tmp_path / "b.parquet"))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_flipped_bits_give_data_or_a_message(tmp_path, compression):
    """In the pages: at a few broken footers Arrow ends its process, which Ray's tasks tell and a test would not survive."""
    table = pq.read_table(captions(tmp_path / "a.parquet", 0, 12))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5, compression=compression)
    whole, rng = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path, store, told = tmp_path / "b.parquet", Store(str(tmp_path / "store")), 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            prepare(store, section(path), max_quarantined_fraction=1)
        except UserError as err:
            told += "b.parquet" in str(err)
        store.delete("data")
    assert told > 5


def test_a_text_that_is_no_utf8_is_told(tmp_path):
    text = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: .*utf-8"):
        source_digest(section(tmp_path / "a.parquet"))


def test_a_column_that_expands_too_far_is_refused_before_it_is_read(tmp_path, monkeypatch):
    table = pa.table({"text": [letter * 2**20 for letter in "abcdef"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    monkeypatch.setattr(parquet, "MAX_EXPANDED_BYTES", 2**21)
    monkeypatch.setattr(parquet.pq.ParquetFile, "iter_batches", None)
    with pytest.raises(UserError, match=r"a.parquet: .*'text' of row group 0 .*a decompression bomb\?"):
        source_digest(section(tmp_path / "a.parquet"))


def test_several_files_and_parts_hold_every_row_once(tmp_path, monkeypatch):
    captions(tmp_path / "set" / "train-0.parquet", 0, 20, group_rows=4)
    captions(tmp_path / "set" / "train-1.parquet", 20, 25, group_rows=4)
    whole = read(section(tmp_path / "set", format="parquet"))
    assert [s.id for s in whole] == [str(i) for i in range(25)]
    assert whole[22].place == "train-1.parquet#2"
    digest = source_digest(section(tmp_path / "set" / "*.parquet"))
    monkeypatch.setattr(sources, "TARGET_PART_BYTES", 1500)
    assert len(open_source(section(tmp_path / "set" / "*.parquet")).scan().parts) > 3
    assert read(section(tmp_path / "set" / "train-{0..1}.parquet")) == whole
    assert source_digest(section(tmp_path / "set", format="parquet")) == digest
    captions(tmp_path / "set" / "train-1.parquet", 20, 26, group_rows=4)
    assert source_digest(section(tmp_path / "set" / "*.parquet")) != digest


def test_from_s3_the_digest_and_the_samples_are_the_same(tmp_path, s3_server):
    captions(tmp_path / "set" / "a.parquet", 0, 30, group_rows=7)
    upload(s3_server, tmp_path / "set", "in/")
    there, local = section(f"{s3_server.uri}/in", format="parquet"), section(tmp_path / "set", format="parquet")
    assert source_digest(there) == source_digest(local)
    assert read(there) == read(local)
    prepared = prepare(Store(f"{s3_server.uri}/store"), there, max_quarantined_fraction=0)
    assert prepared == prepare(Store(str(tmp_path / "store")), local, max_quarantined_fraction=0)


def test_a_column_with_a_dot_in_its_name_is_part_of_the_digest(tmp_path):
    """Else a corrected text would go on with the data that was prepared of the old one."""
    columns = ColumnsSection(text="answer.text", image="image")
    digests = set()
    for number, text in enumerate(("one", "two", "two")):
        path = write(tmp_path / str(number) / "a.parquet", {"image": [png(1)], "answer.text": [text], "answer": [5]})
        digests.add(source_digest(section(path, columns=columns)))
        assert shown(read(section(path, columns=columns))[0])[1] == ["<image>", text]
    assert len(digests) == 2
