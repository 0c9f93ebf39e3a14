"""Are records read exactly, bad ones told by the right reason, and equal sources given equal digests?"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpa_ray.data import sources
from dpa_ray.data.catalog import open_source, source_digest
from dpa_ray.data.files import Folder, unsafe_name
from dpa_ray.data.llava import REASONS
from dpa_ray.data.records import NotJson, NotRecords, scan, scan_part
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import Rejected
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceOptions, SourceSection
from tests.s3 import S3


def png(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def record(i: int, **change: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Answer {i} — ünïcödé 東京"}]
    return {"id": f"r{i}", "image": f"im/{i % 3}.png", "conversations": turns, **change}


def make(folder: Path, records: list[Any], *, lines: bool = False, name: str | None = None) -> SourceSection:
    (folder / "im").mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (folder / "im" / f"{i}.png").write_bytes(png(i))
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path = folder / (name or ("set.jsonl" if lines else "set.json"))
    path.write_text(text)
    return SourceSection(source=str(path))


def read(section: SourceSection) -> list[Sample | Rejected]:
    source = open_source(section)
    pairs = [pair for part in source.scan().parts for pair in source.read(part)]
    assert [row for row, _ in pairs] == list(range(len(pairs)))
    return [value for _, value in pairs]


# -- records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON, max_size=6), st.booleans(), st.sampled_from([None, 1, " "]), st.integers(1, 9), st.data())
def test_a_list_is_read_exactly_however_it_is_cut_and_written(values, ascii_only, indent, chunk, data):
    raw = (
        b"\xef\xbb\xbf" * data.draw(st.booleans()) + json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode()
    )
    found = scan([raw[i : i + chunk] for i in range(0, len(raw), chunk)])
    records = list(found.records)
    assert not found.lines
    assert [r.value for r in records] == values
    assert [json.loads(raw[r.start : r.stop]) for r in records] == values
    if records:
        first = data.draw(st.integers(0, len(records) - 1))
        last = data.draw(st.integers(first, len(records) - 1))
        start, stop = records[first].start, records[last].stop
        assert list(scan_part(raw[start:stop], start, lines=False)) == records[first : last + 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), min_size=1, max_size=6), st.integers(1, 9))
def test_lines_are_read_exactly_with_crlf_and_blank_lines(values, chunk):
    raw = "\r\n\r\n".join(json.dumps(v, ensure_ascii=False) for v in values).encode()
    found = scan([raw[i : i + chunk] for i in range(0, len(raw), chunk)])
    records = list(found.records)
    assert found.lines
    assert [r.value for r in records] == values
    assert list(scan_part(raw[records[0].start : records[-1].stop], records[0].start, lines=True)) == records


def test_a_line_that_is_no_json_becomes_one_bad_record():
    for first in (b'{"a": 1}\n', b'{"a": \n'):
        records = list(scan([first + b'{"b": \nnonsense\n{"c": 3}']).records)
        assert isinstance(records[1].value, NotJson)
        assert isinstance(records[2].value, NotJson)
        assert records[3].value == {"c": 3}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "found an empty file"),
        (b"  \n", "found an empty file"),
        (b"id,image\n1,a.png", "found a file that begins 'id,image"),
        (b'{"data": [\n1]}', "an object over many lines"),
        (b'[{"a": 1}, {"b": ', "at byte"),
        (b'[{"a": 1} {"b": 2}]', r"expected ',' or ']' after a record, found '\{\"b\": 2\}\]' at byte 10"),
        (b'[{"a": 1},]', "at byte 10"),
        (b'[{"a": 1}] x', "expected the end of the file after the list, found 'x' at byte 11"),
        (b"[{'a': 1}]", "at byte 2"),
        (b"[" + b"1" * 5000 + b"]", "cannot be read"),
        (b"[" * 100_000, "cannot be read|expected JSON"),
        ("[]".encode("utf-16"), "found UTF-16"),
        (b"\x1f\x8b....", "found gzip"),
    ],
)
def test_what_holds_no_records_is_told_with_its_place(raw, message):
    with pytest.raises(NotRecords, match=message):
        list(scan([raw]).records)


def test_bytes_that_are_not_utf8_reach_their_own_record_only():
    raw = b'[{"a": "gut \xc3\xbc"}, {"a": "caf\xe9"}, {"a": "\xe6\x9d\xb1"}]'
    assert [r.value["a"] for r in scan([raw]).records] == ["gut ü", "caf\udce9", "東"]


# -- samples


def test_samples_come_out_exactly(tmp_path):
    records = [
        record(0),
        record(1, id=17),
        record(2, id=None),
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": " there \n"}]},
        record(4, image=["im/1.png", "./im//0.png"], id="r0", conversations=[
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "First."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": ""},
        ]),
        record(5, image=[], conversations=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]),
    ]  # fmt: skip
    for lines in (False, True):
        found = read(make(tmp_path, records, lines=lines))
        assert all(isinstance(s, Sample) for s in found), found
        assert [s.id for s in found] == ["r0", "17", None, None, "r0", "r5"]
        assert [s.place for s in found] == [f"#{i}" for i in range(6)]
        assert [[i.data for i in s.images] for s in found] == [
            [png(0)], [png(1)], [png(2)], [], [png(1), png(0)], [],
        ]  # fmt: skip
        assert [(t.role, t.text) for t in found[3].turns] == [("human", "Hi"), ("gpt", " there \n")]
        assert [t.role for t in found[4].turns] == ["system", "human", "gpt", "human", "gpt"]
        assert found[0].turns[1].text == "Answer 0 — ünïcödé 東京"


HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}
BAD = [
    ("bad_record", "x"),
    ("bad_record", 3),
    ("bad_record", None),
    ("bad_record", []),
    ("bad_record", {}),
    ("bad_record", {"conversations": None}),
    ("bad_record", {"conversations": []}),
    ("bad_record", {"conversations": "hi"}),
    ("bad_record", {"conversations": ["hi"]}),
    ("bad_record", record(0, conversations=[HUMAN, {"from": "gpt"}])),
    ("bad_record", record(0, conversations=[HUMAN, {"from": "gpt", "value": 3}])),
    ("bad_record", record(0, conversations=[HUMAN, {"value": "x"}])),
    ("bad_record", record(0, image=3)),
    ("bad_record", record(0, image={"path": "im/0.png"})),
    ("bad_record", record(0, image=["im/0.png", None])),
    ("roles", record(0, conversations=[HUMAN, GPT, GPT])),
    ("roles", record(0, conversations=[HUMAN, HUMAN, GPT])),
    ("roles", record(0, conversations=[GPT, HUMAN])),
    ("roles", record(0, conversations=[HUMAN, {"from": "tool", "value": "x"}, GPT])),
    ("roles", record(0, conversations=[HUMAN, GPT, {"from": "system", "value": "x"}])),
    ("no_assistant_text", record(0, conversations=[HUMAN])),
    ("no_assistant_text", record(0, conversations=[HUMAN, {"from": "gpt", "value": " \n"}])),
    ("no_assistant_text", record(0, conversations=[{"from": "system", "value": "x"}])),
    ("not_utf8", record(0, conversations=[HUMAN, {"from": "gpt", "value": "lone \ud83d half"}])),
    ("not_utf8", record(0, image="im/\udcff.png")),
    ("not_utf8", record(0, id="\udcff")),
    ("image_count", record(0, conversations=[{"from": "human", "value": "What?"}, GPT])),
    ("image_count", record(0, conversations=[{"from": "human", "value": "<image><image>"}, GPT])),
    ("image_count", record(0, image=["im/0.png", "im/1.png"])),
    ("image_count", record(0, image=None)),
    ("unsafe_image_name", record(0, image="/etc/passwd")),
    ("unsafe_image_name", record(0, image="../set.json")),
    ("unsafe_image_name", record(0, image="im/../../x.png")),
    ("unsafe_image_name", record(0, image="im/..")),
    ("unsafe_image_name", record(0, image="..\\x.png")),
    ("unsafe_image_name", record(0, image="C:\\x.png")),
    ("unsafe_image_name", record(0, image="https://example.com/x.png")),
    ("unsafe_image_name", record(0, image="a\0.png")),
    ("image_missing", record(0, image="")),
    ("image_missing", record(0, image="im/none.png")),
    ("image_missing", record(0, image="im")),
    ("image_missing", record(0, image="im/0.png/x")),
    ("image_missing", record(0, image="x" * 300)),
    ("image_missing", record(0, image="pipe")),
    ("image_empty", record(0, image="empty.png")),
    ("image_truncated", record(0, image="cut.png")),
    ("image_not_an_image", record(0, image="text.png")),
    ("image_animated", record(0, image="moving.gif")),
]


@pytest.mark.parametrize("lines", [False, True])
def test_each_kind_of_bad_record_is_told_by_its_reason_and_the_rest_comes_through(tmp_path, lines):
    records = [value for _, bad in BAD for value in (record(1), bad)]
    section = make(tmp_path, records, lines=lines)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(png()[:40])
    (tmp_path / "text.png").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "pipe")
    frames = [Image.new("RGB", (9, 9), (50 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    found = read(section)
    assert all(isinstance(good, Sample) for good in found[::2])
    reasons = [bad.reason if isinstance(bad, Rejected) else bad for bad in found[1::2]]
    assert reasons == [reason for reason, _ in BAD]
    assert set(reasons) <= set(REASONS)
    for i, bad in enumerate(found[1::2]):
        assert isinstance(bad, Rejected)
        assert bad.place == f"#{2 * i + 1}"
        assert bad.detail
        json.dumps(vars(bad)).encode()
    assert found[-1].id == "r0"


def test_a_line_that_is_no_json_is_quarantined_with_its_reason(tmp_path):
    section = make(tmp_path, [record(0), record(1)], lines=True)
    with open(section.source, "a") as file:
        file.write('\n{"id": \n' + json.dumps(record(2)))
    found = read(section)
    assert [getattr(s, "reason", None) for s in found] == [None, None, "bad_record", None]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("a/b.jpg", None), ("a..b/c..jpg", None), ("ü 東#%.png", None), ("..", "'..'"), ("s3://b/x", "absolute")],
)
def test_names_with_odd_characters_are_names(name, problem):
    assert (unsafe_name(name) is None) if problem is None else (problem in str(unsafe_name(name)))


# -- digests and parts


def test_equal_content_elsewhere_has_the_same_digest(tmp_path):
    here = make(tmp_path / "a", [record(i) for i in range(5)])
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    shutil.move(tmp_path / "b" / "c" / "im", tmp_path / "b" / "pictures" / "im")
    (tmp_path / "b" / "c" / "set.json").rename(tmp_path / "b" / "c" / "other.json")
    there = SourceSection(source=str(tmp_path / "b" / "c" / "other.json"), images=str(tmp_path / "b" / "pictures"))
    assert source_digest(here) == source_digest(there)
    (tmp_path / "a" / "im" / "unused.png").write_bytes(png())
    assert source_digest(here) == source_digest(there), "an image that no record names does not count"


def test_the_digest_shows_changes_of_records_and_images(tmp_path):
    digests = {source_digest(section := make(tmp_path, [record(i) for i in range(5)]))}
    (tmp_path / "im" / "1.png").write_bytes(png() + b"x")
    digests.add(source_digest(section))
    (tmp_path / "im" / "1.png").unlink()
    digests.add(source_digest(section))
    digests.add(source_digest(make(tmp_path, [record(i) for i in range(6)])))
    assert len(digests) == 4


def test_what_is_no_matter_of_content_is_not_in_the_digest(tmp_path):
    section = make(tmp_path, [record(0)])
    other = section.model_copy(update={"fraction": 0.5, "image_aspect": "pad", "format": "llava"})
    assert source_digest(section) == source_digest(other)


def test_shapes_digest_by_options():
    def digest(**options: Any) -> str:
        return source_digest(SourceSection(source="builtin:shapes", options=SourceOptions(**options)))

    assert digest(size=5) == digest(size=5)
    assert len({digest(), digest(seed=1), digest(style="qa"), digest(size=3), digest(split="heldout")}) == 5


def test_shapes_read_in_parts_are_the_generators(monkeypatch):
    from dpa_ray.data import shapes

    options = SourceOptions(size=7, style="qa")
    monkeypatch.setattr(sources, "MAX_PART_ROWS", 3)
    assert read(SourceSection(source="builtin:shapes", options=options)) == list(shapes.generate(options))


@pytest.mark.parametrize("lines", [False, True])
def test_parts_hold_every_row_once_and_near_the_target(tmp_path, monkeypatch, lines):
    section = make(tmp_path, [record(i) for i in range(40)], lines=lines)
    whole = read(section)
    monkeypatch.setattr(sources, "TARGET_PART_BYTES", 2000)
    parts = open_source(section).scan().parts
    assert len(parts) > 3
    assert [p.index for p in parts] == list(range(len(parts)))
    assert read(section) == whole
    monkeypatch.setattr(sources, "MAX_PART_ROWS", 2)
    assert {p.num_rows for p in open_source(section).scan().parts} == {2}
    assert read(section) == whole


# -- errors of a whole source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "{folder}/none.json"}, "expected a file at .*none.json, found nothing"),
        ({"source": "{folder}"}, "expected a file at .*, found a folder"),
        ({"source": "{folder}/set.json", "images": "{folder}/none"}, "expected a folder of images at .*found nothing"),
        ({"source": "{folder}/set.json", "images": "{folder}/set.json"}, "expected a folder of images.*found a file"),
        ({"source": "ftp://bucket/set.json"}, "expected a local path, file://, s3:// or gs:// URI"),
        ({"source": "{folder}/set.tar"}, "expected a file or folder at .*set.tar, found nothing"),
        ({"source": "{folder}/set.json", "format": "webdataset"}, "expected a tar, found another file"),
        ({"source": "{folder}/set.json", "format": "parquet"}, "expected Parquet, found a file that cannot be read"),
        ({"source": "{folder}/bad.json"}, "bad.json: expected JSON, found .* at byte"),
        ({"source": "{folder}/empty.json"}, "empty.json: expected records, found an empty list"),
    ],
)
def test_a_source_that_cannot_be_read_is_told(tmp_path, change, message):
    make(tmp_path, [record(0)])
    (tmp_path / "bad.json").write_text('[{"id": 1}, {]')
    (tmp_path / "empty.json").write_text(" [ ] ")
    section = SourceSection(**{k: v.format(folder=tmp_path) for k, v in change.items()})
    with pytest.raises(UserError, match=message):
        source_digest(section)


def test_a_text_only_source_needs_no_image_folder(tmp_path):
    make(tmp_path, [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}])
    found = read(SourceSection(source=str(tmp_path / "set.json"), images=str(tmp_path / "none")))
    assert isinstance(found[0], Sample)


def test_a_relative_path_and_home_are_understood(tmp_path, monkeypatch):
    section = make(tmp_path, [record(0)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    digests = {source_digest(SourceSection(source=s)) for s in ("set.json", "./set.json", "~/set.json", section.source)}
    assert len(digests) == 1
    assert isinstance(read(SourceSection(source="set.json"))[0], Sample)


# -- S3


def upload(s3: S3, folder: Path, prefix: str) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        s3.client().put_object(Bucket=s3.bucket, Key=f"{prefix}{path.relative_to(folder)}", Body=path.read_bytes())


def test_the_same_source_on_s3_has_the_same_digest_and_samples(tmp_path, s3_server, monkeypatch):
    names = [f"im/{i % 3}.png" for i in range(5)] + ["ü 東#%+.png", "im/none.png"]
    section = make(tmp_path, [record(i, image=name) for i, name in enumerate(names)])
    (tmp_path / "ü 東#%+.png").write_bytes(png(9))
    upload(s3_server, tmp_path, "some/set/")
    there = SourceSection(source=f"{s3_server.uri}/some/set/set.json")
    for list_from in (64, 1):  # asked for one by one, and listed
        monkeypatch.setattr("dpa_ray.data.files._LIST_FROM", list_from)
        assert source_digest(there) == source_digest(section)
    local, remote = read(section), read(there)
    assert remote[:-1] == local[:-1]
    assert [getattr(s, "reason", None) for s in remote] == [None] * 6 + ["image_missing"]


def test_what_is_missing_on_s3_is_told(tmp_path, rclone_s3):
    make(tmp_path, [record(0)])
    upload(rclone_s3, tmp_path, "")
    for change, message in [
        ({"source": f"{rclone_s3.uri}/none.json"}, "expected a file at s3://.*/none.json, found nothing"),
        ({"source": "s3://no-such-bucket-here/set.json"}, "s3://no-such-bucket-here/set.json"),
        ({"source": f"{rclone_s3.uri}/set.json", "images": f"{rclone_s3.uri}/none"}, "folder of images at s3://"),
    ]:
        with pytest.raises(UserError, match=message):
            source_digest(SourceSection(**change))


def test_an_s3_server_that_is_away_is_an_error_and_no_quarantine(tmp_path, rclone_s3, monkeypatch):
    make(tmp_path, [record(0)])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be read"):
        Folder(f"{rclone_s3.uri}/im").read("0.png")


def test_an_image_that_many_records_name_is_the_same_object_once(tmp_path):
    found = read(make(tmp_path, [record(0, id=i) for i in range(50)]))
    assert len({id(s.images[0].data) for s in found}) < 20  # read by 8 threads before the first is kept
    assert np.all([s.images[0].data == png(0) for s in found])
