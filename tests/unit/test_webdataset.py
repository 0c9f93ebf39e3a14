"""Do WebDataset tars come out exactly, is what no sample may be made of told, and does nothing leave the tar?"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.data import sources, webdataset
from dpa_ray.data.catalog import open_source, source_digest
from dpa_ray.data.known import Known
from dpa_ray.data.listing import Files, expand_braces
from dpa_ray.data.llava import REASONS
from dpa_ray.data.prepare import prepare
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import Rejected
from dpa_ray.errors import UserError
from dpa_ray.recipe import ColumnsSection, SourceSection
from dpa_ray.store import Store
from tests.unit.test_sources import png, read, upload

Content = bytes | str | dict[str, Any]


def tar(path: Path, members: list[tuple[str, Content]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            data = json.dumps(content) if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(start: int, stop: int) -> list[tuple[str, Content]]:
    """Samples of an image and a caption."""
    return [m for i in range(start, stop) for m in ((f"{i:04}.png", png(i)), (f"{i:04}.txt", f"caption {i}"))]


def section(source: Any, **keys: Any) -> SourceSection:
    return SourceSection(source=str(source), **keys)


def shown(sample: Sample | Rejected) -> tuple[Any, ...]:
    assert isinstance(sample, Sample), sample
    return (sample.id, [t.text for t in sample.turns], [(i.name, i.data) for i in sample.images])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_layout_of_a_sample_comes_out_exactly(tmp_path, form):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "That."},
    ]
    long = "deep/" * 40 + "東京"
    path = tar(
        tmp_path / "a.tar",
        [
            ("a.JPG", png(1)), ("a.txt", "\ufeffünïcödé 東京\n"),
            ("./b.10.png", png(2)), ("./b.9.png", png(3)), ("./b.caption", "two"),
            ("c.txt", "no image"),
            ("d.json", {"caption": "in json", "width": 3}), ("d.webp", png(4)),
            ("e.png", png(5)), ("e.json", {"id": 7, "conversations": turns}),
            ("f.png", png(6)), ("f.json", {"messages": messages}),
            (f"{long}.png", png(7)), (f"{long}.txt", "long name"),
            ("README", "no sample"), ("._g.jpg", b"\0"), (".DS_Store", b"\0"),
        ],
        form,
    )  # fmt: skip
    assert [shown(s) for s in read(section(path))] == [
        ("a", ["<image>", "ünïcödé 東京\n"], [("a.JPG", png(1))]),
        ("b", ["<image>\n<image>", "two"], [("./b.9.png", png(3)), ("./b.10.png", png(2))]),
        ("c", ["", "no image"], []),
        ("d", ["<image>", "in json"], [("d.webp", png(4))]),
        ("7", ["<image>\nWhat?", "It."], [("e.png", png(5))]),
        ("f", ["<image>\nAnd?", "That."], [("f.png", png(6))]),
        (long, ["<image>", "long name"], [(f"{long}.png", png(7))]),
    ]


def test_columns_choose_among_captions_and_images(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        [("a.png", png(1)), ("a.mask.png", png(2)), ("a.short.txt", "s"), ("a.long.txt", "l"), ("a.json", {"q": "Q?"})],
    )
    (bad,) = read(section(path))
    assert isinstance(bad, Rejected)
    assert "found short.txt and long.txt: name one by columns.text" in bad.detail
    (sample,) = read(section(path, columns=ColumnsSection(text="long.txt", prompt="q", image="png")))
    assert shown(sample) == ("a", ["<image>\nQ?", "l"], [("a.png", png(1))])
    (other,) = read(section(path, columns=ColumnsSection(text="short.txt", image="png")))
    assert shown(other)[1] == ["<image>", "s"]


BAD: list[tuple[str, list[tuple[str, Content]]]] = [
    ("unsafe_member", [("../x.png", png()), ("../x.txt", "t")]),
    ("unsafe_member", [("/etc/x.png", png()), ("/etc/x.txt", "t")]),
    ("unsafe_member", [("a/../../x.png", png()), ("a/../../x.txt", "t")]),
    ("unsafe_member", [("C:\\x.png", png()), ("C:\\x.txt", "t")]),
    ("bad_record", [("x.png", png())]),
    ("bad_record", [("x.png", png()), ("x.png", png()), ("x.txt", "t"), ("x.txt", "t")]),
    ("bad_record", [("x.png", png()), ("x.json", "{")]),
    ("bad_record", [("x.png", png()), ("x.json", "[1]")]),
    ("bad_record", [("x.png", png()), ("x.json", {"width": 3})]),
    ("bad_record", [("x.png", png()), ("x.json", {"caption": 3})]),
    ("bad_record", [("x.png", png()), ("x.json", {"conversations": "{"})]),
    ("bad_record", [("x.npy", b"1")]),
    ("no_assistant_text", [("x.png", png()), ("x.txt", " \n")]),
    ("not_utf8", [("x.png", png()), ("x.txt", b"caf\xe9")]),
    ("image_count", [("x.png", png()), ("x.txt", "the <image> here")]),
    ("image_count", [("x.0.png", png()), ("x.1.png", png()), ("x.json", {"conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "t"}]})]),
    ("roles", [("x.json", {"conversations": [{"from": "gpt", "value": "t"}]})]),
    ("image_empty", [("x.png", b""), ("x.txt", "t")]),
    ("image_truncated", [("x.png", png()[:40]), ("x.txt", "t")]),
    ("image_not_an_image", [("x.jpg", b"<html>"), ("x.txt", "t")]),
]  # fmt: skip


def test_each_bad_sample_is_told_by_its_reason_and_the_rest_comes_through(tmp_path):
    members: list[tuple[str, Content]] = []
    for i, (_, bad) in enumerate(BAD):
        members += pairs(i, i + 1) + bad
    found = read(section(tar(tmp_path / "a.tar", members)))
    assert [s.id for s in found[::2]] == [f"{i:04}" for i in range(len(BAD))]
    assert [getattr(s, "reason", s) for s in found[1::2]] == [reason for reason, _ in BAD]
    assert {reason for reason, _ in BAD} <= set(REASONS)
    for bad in found[1::2]:
        assert isinstance(bad, Rejected)
        assert bad.detail
        json.dumps(vars(bad)).encode()
    assert (found[9].id, found[9].place) == ("x", "#x")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_quarantined_and_never_followed(tmp_path, kind):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            if name == "a.png":
                info.type, info.linkname = kind, str(secret)
                archive.addfile(info)
            else:
                info.size = len(png())
                archive.addfile(info, io.BytesIO(png()))
            text = tarfile.TarInfo(name.replace("png", "txt"))
            text.size = 1
            archive.addfile(text, io.BytesIO(b"t"))
    bad, good = read(section(path))
    assert isinstance(bad, Rejected)
    assert (bad.id, bad.reason) == ("a", "unsafe_member")
    assert "expected a plain file, found a" in bad.detail
    assert isinstance(good, Sample)


def test_a_cut_tar_is_an_error_with_its_name_and_the_byte(tmp_path):
    whole = tar(tmp_path / "a.tar", pairs(0, 5)).read_bytes()
    end = whole.rindex(b"caption 4") + 512  # the last member's content and padding end here
    for cut in range(512, end + 1, 100):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"b\.tar: truncated: expected .* byte [0-9]+") as caught:
            source_digest(section(tmp_path / "b.tar"))
        assert f"byte {cut}" in str(caught.value)
    (tmp_path / "b.tar").write_bytes(whole[: end // 512 * 512] + b"\0" * 512)
    assert len(read(section(tmp_path / "b.tar"))) == 5, "one block of zeros is an end"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a tar, found an empty file"),
        (b"x" * 2000, "expected a tar, found another file"),
        (gzip.compress(b"x"), "not compressed, found gzip"),
        (b"\0" * 10240, "expected samples like 0001.jpg and 0001.txt, found none"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        source_digest(section(tmp_path / "a.tar"))


def test_a_broken_header_in_the_middle_is_told_and_not_taken_for_the_end(tmp_path):
    data = bytearray(tar(tmp_path / "a.tar", pairs(0, 4)).read_bytes())
    at = data.index(b"0002.png")
    data[at : at + 4] = b"9999"
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=f"expected a member's header at byte {at}, found none"):
        source_digest(section(tmp_path / "a.tar"))


def test_braces_globs_and_folders_name_the_same_tars(tmp_path):
    for i in range(3):
        tar(tmp_path / "set" / f"s-{i:02}.tar", pairs(i * 4, i * 4 + 4))
    (tmp_path / "set" / "notes.md").write_text("x")
    found = [read(section(tmp_path / "set" / name)) for name in ("s-{00..02}.tar", "s-*.tar", "s-0[0-2].tar")]
    found.append(read(section(tmp_path / "set", format="webdataset")))
    assert all(f == found[0] for f in found)
    assert [s.id for s in found[0]] == [f"{i:04}" for i in range(12)]
    assert found[0][5].place == "s-01.tar#0005"
    digests = {source_digest(section(tmp_path / "set" / name)) for name in ("s-{00..02}.tar", "s-*.tar")}
    assert len(digests) == 1
    with pytest.raises(UserError, match=r"expected a file or folder at .*s-03.tar, found nothing"):
        source_digest(section(tmp_path / "set" / "s-{00..03}.tar"))
    with pytest.raises(UserError, match="expected a file that it names, found none"):
        source_digest(section(tmp_path / "set" / "t-*.tar"))


def test_braces_are_expanded_as_in_a_shell():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain") == ["plain"]
    for wrong in ("{3..1}", "{0..99999999}", "{0..999}{0..999}{0..999}"):
        with pytest.raises(UserError, match="expected"):
            expand_braces(wrong)


def test_the_folder_of_a_pattern_is_what_precedes_it(tmp_path):
    files = Files(str(tmp_path / "v*" / "s-{0..1}.tar"), ".tar")
    assert files.folder == str(tmp_path)
    assert files.label(f"{tmp_path}/v1/s-0.tar") == "v1/s-0.tar"


def test_parts_hold_every_row_once_and_the_digest_shows_changes(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", pairs(0, 40))
    whole, digest = read(section(path)), source_digest(section(path))
    monkeypatch.setattr(sources, "TARGET_PART_BYTES", 10_000)
    assert len(open_source(section(path)).scan().parts) > 3
    assert read(section(path)) == whole
    assert source_digest(section(path)) == digest
    tar(path, [(name, "Caption 3" if name == "0003.txt" else data) for name, data in pairs(0, 40)])
    assert source_digest(section(path)) != digest, "a text of the same length"
    tar(path, pairs(0, 39))
    assert source_digest(section(path)) != digest


def test_a_tar_is_gone_through_once_as_long_as_it_is_the_same(tmp_path, monkeypatch):
    path, store = tar(tmp_path / "a.tar", pairs(0, 9)), Store(str(tmp_path / "store"))
    scanned: list[str] = []
    inner = webdataset._scan_tar
    monkeypatch.setattr(webdataset, "_scan_tar", lambda uri: (scanned.append(uri), inner(uri))[1])

    def digest(write: bool = True) -> tuple[str, int]:
        scanned.clear()
        return source_digest(section(path), Known(store, write=write)), len(scanned)

    first = digest()
    assert first == digest(), "changed just now: not to be trusted"
    os.utime(path, (1e9, 1e9))
    assert digest(write=False) == digest() == first
    assert digest() == (first[0], 0)
    assert read(section(path))[8].id == "0008"
    os.utime(path, (1e9, 1e9 + 1))
    assert digest() == first
    tar(path, pairs(1, 10))
    os.utime(path, (1e9, 1e9))
    assert digest() == (first[0], 0), "of the same size and time: the same file, by what can be told of it"
    os.utime(path, (1e9, 1e9 + 2))
    assert digest()[0] != first[0]


def test_from_s3_the_digest_and_the_samples_are_the_same(tmp_path, s3_server, monkeypatch):
    monkeypatch.setattr("dpa_ray.data.tar._WINDOW_BYTES", 3000)  # so that a window ends within members
    for i in range(2):
        tar(tmp_path / "set" / f"s-{i}.tar", pairs(i * 20, i * 20 + 20))
    upload(s3_server, tmp_path / "set", "some/set/")
    local = section(tmp_path / "set" / "s-{0..1}.tar")
    for name in ("s-{0..1}.tar", "s-*.tar", ""):
        there = section(f"{s3_server.uri}/some/set/{name}", format="webdataset")
        assert source_digest(there) == source_digest(local)
        assert read(there) == read(local)
    store = Store(f"{s3_server.uri}/store")
    assert prepare(store, there, max_quarantined_fraction=0).num_rows == 40


def test_an_image_that_comes_twice_is_told(tmp_path):
    """`tar -r` adds a corrected one behind the old one, which stays."""
    members = [("1.png", png(1)), ("1.png", png(2)), ("1.txt", "one"), ("2.png", png(3)), ("2.txt", "two")]
    bad, good = read(section(tar(tmp_path / "a.tar", members)))
    assert isinstance(bad, Rejected)
    assert "expected each member once, found 1.png, 1.png" in str(bad)
    assert shown(good) == ("2", ["<image>", "two"], [("2.png", png(3))])
