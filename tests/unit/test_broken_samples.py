"""Does every kind of broken sample go to quarantine with its reason, and does everything ordinary beside it come out?"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpa_ray.data import images
from dpa_ray.data.images import decode
from dpa_ray.data.llava import REASONS
from dpa_ray.data.prepare import prepare
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
from tests.broken_images import FILES, PICTURE, saved
from tests.unit.test_prepare import samples

GOOD_IMAGE = saved(PICTURE, "PNG")
ASK, TELL = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}


def of(*turns: tuple[Any, Any]) -> dict[str, Any]:
    """A record without an image, of (role, text) pairs."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def told(text: Any) -> dict[str, Any]:
    """A record whose one answer is `text`."""
    return of(("human", "Hi"), ("gpt", text))


def named(name: Any, **change: Any) -> dict[str, Any]:
    """A record with `name` under image, and one <image>."""
    return {"image": name, "conversations": [ASK, TELL], **change}


def shown(value: str, image: Any) -> dict[str, Any]:
    """A record whose question is `value`, with `image`."""
    return {"image": image, "conversations": [{"from": "human", "value": value}, TELL]}


NOT_A_RECORD: list[tuple[str, Any]] = [
    ("bad_record", value) for value in ("text", "", 3, 1.5, True, False, None, [], {}, [named("good.png")])
]  # fmt: skip
NOT_JSON: list[tuple[str, bytes]] = [
    ("bad_record", line)
    for line in (
        b"nonsense", b'{"id": "half', b'{"id": "a", }', b"{'id': 'a'}", b'{"id": "a"} {"id": "b"}', b"// a comment", b"}", b",",
        b'{"id": "a" "image": "b"}', b'{id: "a"}', b'{"id": "tab\there"}', b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}", b"\0\0\0", b"\xff\xfe{\0}\0", b"id,image,text", b"<html>", b'{"id": "\\x41"}', b'{"id": undefined}',
    )
]  # fmt: skip
CONVERSATIONS: list[tuple[str, dict[str, Any]]] = [
    *[("bad_record", {"conversations": v}) for v in (None, "hi", 3, True, {}, [], {"0": TELL}, [[]], [None], ["hi"], [3], [[ASK]])],
    ("bad_record", {"messages": [ASK, TELL]}),
    ("bad_record", {"image": "good.png"}),
    *[("bad_record", told(v)) for v in (None, 3, 1.5, True, [], ["It."], {}, {"text": "It."})],
    *[("bad_record", of(("human", "Hi"), (role, "It."))) for role in (None, 3, False, ["gpt"], {"gpt": 1})],
    ("bad_record", {"conversations": [{"from": "human"}, TELL]}),
    ("bad_record", {"conversations": [{"value": "Hi"}, TELL]}),
    ("bad_record", {"conversations": [{"speaker": "human", "text": "Hi"}, TELL]}),
    *[("roles", of(("human", "Hi"), (role, "It."))) for role in ("", "GPT", " gpt", "tool", "function", "human", "user", "system", "\udcff")],
    ("roles", of(("gpt", "It."), ("human", "Hi"))),
    ("roles", of(("gpt", "It."))),
    ("roles", of(("human", "Hi"), ("gpt", "It."), ("gpt", "More."))),
    ("roles", of(("human", "Hi"), ("human", "Hi"), ("gpt", "It."))),
    ("roles", of(("human", "Hi"), ("gpt", "It."), ("human", "So?"), ("user", "So?"))),
    ("roles", of(("system", "Be."), ("gpt", "It."))),
    ("roles", of(("system", "Be."), ("system", "Do."), ("human", "Hi"), ("gpt", "It."))),
    ("roles", of(("human", "Hi"), ("system", "Be."), ("gpt", "It."))),
    ("roles", of(("human", "Hi"), ("gpt", "It."), ("system", "Be."))),
    ("no_assistant_text", of(("human", "Hi"))),
    ("no_assistant_text", of(("system", "Be."))),
    ("no_assistant_text", of(("system", "Be."), ("human", "Hi"))),
    *[("no_assistant_text", told(text)) for text in ("", " ", "\n\t\r\n", "\u00a0\u3000", "\u200b\u200d", "\ufeff", "\0", "\u2028\x1b\x7f")],
    ("no_assistant_text", {"image": "good.png", "conversations": [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image>\n"}]}),
    ("no_assistant_text", of(("human", "Hi"), ("gpt", ""), ("human", "So?"), ("gpt", " "))),
    *[("not_utf8", told(text)) for text in ("lone \ud83d half", "\udc00", "\udcff", "\ude00\ud83d")],
    ("not_utf8", of(("human", "\ud83d"), ("gpt", "It."))),
    ("not_utf8", of(("system", "\ud83d"), ("human", "Hi"), ("gpt", "It."))),
]  # fmt: skip
IMAGE_KEY: list[tuple[str, dict[str, Any]]] = [
    *[("bad_record", named(value)) for value in (3, 0, 1.5, True, False, {}, {"path": "good.png"}, [None], [3], [["good.png"]], ["good.png", {}])],
    *[("image_count", named(value)) for value in (None, [], ["good.png"] * 2, ["good.png"] * 3)],
    *[("image_count", shown(text, "good.png")) for text in ("What?", "", "<image", "< image>", "<IMAGE>", "<image><image>", "<image>" * 99)],
    ("image_count", {"conversations": [ASK, TELL]}),
    ("image_count", {"images": ["good.png"], "conversations": [ASK, TELL]}),
    ("image_count", {"image": "good.png", "conversations": [ASK, {"from": "gpt", "value": "It: <image>"}]}),
    ("image_count", {"image": "good.png", "conversations": [{"from": "system", "value": "<image>"}, ASK, TELL]}),
    *[
        ("unsafe_image_name", named(name))
        for name in (
            "/good.png", "//host/good.png", "..", "../good.png", "a/../../good.png", "im/..", "im/../good.png", "..\\good.png",
            "im\\..\\good.png", "C:\\good.png", "c:/good.png", "\\good.png", "\\\\host\\share\\good.png", "http://example.com/good.png",
            "HTTPS://example.com/good.png", "s3://bucket/good.png", "file:///good.png", "data:image/png;base64,iVBORw0KGgo=",
            "good.png\0", "\0", "good\0.png", "good.png\0.jpg",
        )
    ],
    ("unsafe_image_name", shown("<image><image>", ["good.png", "../good.png"])),
    ("not_utf8", named("\udcff.png")),
    *[
        ("image_missing", named(name))
        for name in (
            "", " ", ".", "./", "none.png", "im", "im/", "good.png/x.png", "GOOD.PNG", " good.png", "good.png ", "good%2Epng", "im\\good.png",
            "~/good.png", "*.png", "x" * 300, "y/" * 3000, "\U0001f600" * 100, "pipe", "socket", "dangling", "loop",
        )
    ],
    ("image_missing", shown("<image><image>", ["good.png", "none.png"])),
    ("image_missing", shown("<image><image>", ["good.png", ""])),
    ("image_size", named("heavy.png")),
]  # fmt: skip
NOT_UTF8: list[tuple[str, bytes]] = [
    ("not_utf8", b'{"id": "%d", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "' + text + b'"}]}')
    for text in (b"caf\xe9", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"cut \xe6\x9d", "日本".encode("shift-jis"))
]  # fmt: skip
OF_FILES = [(reason, named(name)) for reason, name, _ in FILES]
BROKEN: list[tuple[str, Any]] = [*NOT_A_RECORD, *NOT_JSON, *CONVERSATIONS, *IMAGE_KEY, *NOT_UTF8, *OF_FILES]


def line_of(number: int, value: Any) -> tuple[str | None, bytes]:
    """(id expected in quarantine, line of the file) of a broken record."""
    if isinstance(value, bytes):
        return (str(number), value.replace(b"%d", str(number).encode())) if b"%d" in value else (None, value)
    if isinstance(value, dict) and value:
        return f"bad {number}", json.dumps({"id": f"bad {number}", **value}).encode()
    return None, json.dumps(value).encode()


def prepared_of(folder: Path, lines: list[bytes], end: bytes = b"\n") -> tuple[list[Sample], list[dict[str, Any]]]:
    """What one call of prepare() makes of a JSONL file: samples and lines of quarantine."""
    (folder / "set.jsonl").write_bytes(end.join(lines))
    store = Store(str(folder / "store"))
    prepared = prepare(store, SourceSection(source=str(folder / "set.jsonl")), max_quarantined_fraction=1)
    quarantine = store.read_bytes(f"{prepared.path}/quarantine.jsonl").decode().splitlines()
    return samples(store, prepared), [json.loads(line) for line in quarantine]


def test_each_kind_of_broken_sample_is_quarantined_with_its_reason_and_the_good_ones_come_out_exactly(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    for _, name, data in FILES:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(GOOD_IMAGE)
    (tmp_path / "heavy.png").write_bytes(GOOD_IMAGE + bytes(2**20))
    (tmp_path / "im").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    (tmp_path / "dangling").symlink_to("none.png")
    (tmp_path / "loop").symlink_to("loop")
    lines, expected, good = [], [], []
    for number, (reason, value) in enumerate(BROKEN):
        answer = f"Answer {number} — ünïcödé 東京"
        conversations = [ASK, {"from": "gpt", "value": answer}]
        record = {"id": f"good {number}", "image": "good.png", "conversations": conversations}
        turns = [Turn("human", "<image>\nWhat?"), Turn("gpt", answer)]
        place = f"set.jsonl#{len(lines)}"
        good.append(Sample(f"good {number}", place, turns, [ImageFile("good.png", GOOD_IMAGE)]))
        lines.append(json.dumps(record, ensure_ascii=number % 2 == 0).encode())
        identity, line = line_of(number, value)
        expected.append((identity, f"set.jsonl#{len(lines)}", reason))
        lines.append(line)
    found, quarantine = prepared_of(tmp_path, lines)
    assert [(q["id"], q["place"], q["reason"]) for q in quarantine] == expected
    assert all(q["detail"] and set(q) == {"id", "place", "reason", "detail"} for q in quarantine)
    assert found == good
    assert len(set(lines[1::2])) == len(BROKEN) == 269, "kinds, each another"
    assert {reason for reason, _ in BROKEN} == set(REASONS) - {"unsafe_member"}, "every reason but the tars'"


@pytest.mark.parametrize(("identity", "written"), [("\udcff", "\\udcff"), ("a\ud83d", "a\\ud83d")])
def test_an_id_that_is_not_utf8_is_quarantined_and_written_with_escapes(tmp_path, identity, written):
    good = json.dumps({"id": "a", **told("It.")}).encode()
    found, quarantine = prepared_of(tmp_path, [good, json.dumps({"id": identity, **told("It.")}).encode()])
    assert [s.id for s in found] == ["a"]
    assert [(q["id"], q["reason"]) for q in quarantine] == [(written, "not_utf8")]


# -- ordinary variety


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(PICTURE, "JPEG", exif=exif)


GREY = Image.linear_gradient("L").resize((40, 30))
CLEAR = PICTURE.copy()
CLEAR.putalpha(GREY.resize(PICTURE.size))
PAGES = [GREY.resize((20, 20)), GREY.resize((30, 30))]
ORDINARY_FILES: dict[str, bytes] = {
    "cmyk.jpg": saved(PICTURE.convert("CMYK"), "JPEG"),
    "cmyk.tiff": saved(PICTURE.convert("CMYK"), "TIFF"),
    "lab.tiff": saved(Image.new("LAB", (9, 9), (99, 128, 128)), "TIFF"),
    "palette.png": saved(PICTURE.quantize(16), "PNG"),
    "palette.gif": saved(PICTURE.quantize(16), "GIF"),
    "palette_clear.png": saved(PICTURE.quantize(16), "PNG", transparency=0),
    "alpha.png": saved(CLEAR, "PNG"),
    "alpha.webp": saved(CLEAR, "WEBP"),
    "grey_alpha.png": saved(CLEAR.convert("LA"), "PNG"),
    "colour_key.png": saved(PICTURE, "PNG", transparency=(1, 2, 3)),
    "grey.png": saved(GREY, "PNG"),
    "grey.jpg": saved(GREY, "JPEG"),
    "bits.png": saved(GREY.convert("1"), "PNG"),
    "bits.tiff": saved(GREY.convert("1"), "TIFF", compression="group4"),
    "deep.png": saved(GREY.convert("I;16"), "PNG"),
    "deep.tiff": saved(GREY.convert("I;16"), "TIFF"),
    "deeper.tiff": saved(GREY.convert("I"), "TIFF"),
    "float.tiff": saved(GREY.convert("F"), "TIFF"),
    **{f"orientation_{n}.jpg": oriented(n) for n in range(10)},  # 0 and 9 say nothing
    "broken_exif.jpg": saved(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "broken_profile.jpg": saved(PICTURE, "JPEG", icc_profile=b"no profile"),
    "progressive.jpg": saved(PICTURE, "JPEG", progressive=True),
    "interlaced.gif": saved(PICTURE, "GIF", interlace=1),
    "lossy.webp": saved(PICTURE, "WEBP"),
    "lossless.webp": saved(PICTURE, "WEBP", lossless=True),
    "still.avif": saved(PICTURE, "AVIF"),
    "still.jp2": saved(PICTURE, "JPEG2000"),
    "still.bmp": saved(PICTURE, "BMP"),
    "still.ppm": saved(PICTURE, "PPM"),
    "still.ico": saved(PICTURE, "ICO"),
    "pages.tiff": saved(PAGES[0], "TIFF", save_all=True, append_images=PAGES[1:]),
    "preview.jpg": saved(PICTURE, "MPO", save_all=True, append_images=PAGES[:1]),
    "one_frame.png": saved(PICTURE, "PNG", save_all=True),
    "UPPER.JPG": saved(PICTURE, "JPEG"),
    "Mixed.PnG": saved(PICTURE, "PNG"),
    "png_named.jpg": saved(PICTURE, "PNG"),
    "jpeg_named.png": saved(PICTURE, "JPEG"),
    "webp_named.jpg": saved(PICTURE, "WEBP"),
    "no_extension": saved(PICTURE, "JPEG"),
    "page.html": saved(PICTURE, "PNG"),
    "trailing.jpg": saved(PICTURE, "JPEG") + b"<html></html>",
    "trailing.png": saved(PICTURE, "PNG") + bytes(99),
    "one_wide.png": saved(PICTURE.resize((1, 200)), "PNG"),
    "one_high.jpg": saved(PICTURE.resize((200, 1)), "JPEG"),
    "one_pixel.png": saved(PICTURE.resize((1, 1)), "PNG"),
    "one_pixel.gif": saved(PICTURE.resize((1, 1)), "GIF"),
    "three_high.png": saved(PICTURE.resize((7, 3)), "PNG"),
    "日本語 ü é\u0301 😀.png": saved(PICTURE, "PNG"),
    "a b#c%20?d&e'f\"g;h.png": saved(PICTURE, "PNG"),
    "a..b.png": saved(PICTURE, "PNG"),
    "...png": saved(PICTURE, "PNG"),
    ".hidden.png": saved(PICTURE, "PNG"),
    "-rf.png": saved(PICTURE, "PNG"),
    "new\nline.png": saved(PICTURE, "PNG"),
    "at 12:30.png": saved(PICTURE, "PNG"),
    "a/b/c/deep.png": saved(PICTURE, "PNG"),
}
SHORT = [Turn("human", "Hi"), Turn("gpt", "It.")]
ORDINARY: list[tuple[dict[str, Any], str | None, list[Turn], list[str]]] = [
    # record, and what comes of it: id, turns, names of images
    ({"id": "a", **told("It.")}, "a", SHORT, []),
    ({"id": "a", **told("It.")}, "a", SHORT, []),  # ids may be repeated
    (told("It."), None, SHORT, []),
    ({"id": None, **told("It.")}, None, SHORT, []),
    ({"id": 17, **told("It.")}, "17", SHORT, []),
    ({"id": -(10**30), **told("It.")}, "-1000000000000000000000000000000", SHORT, []),
    ({"id": 1.5, **told("It.")}, "1.5", SHORT, []),
    ({"id": "", **told("It.")}, "", SHORT, []),
    ({"id": "000000033471.jpg ü 😀", **told("It.")}, "000000033471.jpg ü 😀", SHORT, []),
    *[({"id": value, **told("It.")}, None, SHORT, []) for value in (True, [], ["a"], {}, {"a": 1})],  # no ids
    ({"model": "", "image_size": [1, None], "conversation": 3, "NaN": float("nan"), **told("It.")}, None, SHORT, []),
    ({"image": None, **told("It.")}, None, SHORT, []),
    ({"image": [], **told("It.")}, None, SHORT, []),
    ({"conversations": [{"from": "human", "value": "Hi", "weight": 1}, TELL]}, None, SHORT, []),
    ({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It."}]}, None, SHORT, []),
    (of(("user", "Hi"), ("gpt", "It.")), None, SHORT, []),
    (of(("system", "Be."), ("human", "Hi"), ("gpt", "It.")), None, [Turn("system", "Be."), *SHORT], []),
    (of(("human", "Hi"), ("gpt", "It."), ("human", "So?")), None, [*SHORT, Turn("human", "So?")], []),
    (of(("human", "Hi"), ("gpt", ""), ("human", "Hi"), ("gpt", "It.")), None, [SHORT[0], Turn("gpt", ""), *SHORT], []),
    (of(("human", ""), ("gpt", "It.")), None, [Turn("human", ""), SHORT[1]], []),
    *[
        (told(text), None, [SHORT[0], Turn("gpt", text)], [])
        for text in (
            ".", "0", " It.\r\n", "a\0b", "\ufeffIt.", "日本語", "😀", "👩\u200d🚀", "مرحبا", "e\u0301", "<b>&amp;</b>", '"\\', "<Image>", "x" * 99_999,
        )
    ],
    (shown("<image>", "grey.png"), None, [Turn("human", "<image>"), SHORT[1]], ["grey.png"]),
    (shown("What?<image>", ["grey.png"]), None, [Turn("human", "What?<image>"), SHORT[1]], ["grey.png"]),
    (shown("<image> or <image>?", ["grey.png", "bits.png"]), None, [Turn("human", "<image> or <image>?"), SHORT[1]], ["grey.png", "bits.png"]),
    (shown("<image><image>", ["grey.png"] * 2), None, [Turn("human", "<image><image>"), SHORT[1]], ["grey.png"] * 2),
    (shown("<image>", "./a//b/./c/deep.png"), None, [Turn("human", "<image>"), SHORT[1]], ["./a//b/./c/deep.png"]),
    (
        {"image": "grey.png", "conversations": [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image> there"}]},
        None, [Turn("human", "Draw."), Turn("gpt", "<image> there")], ["grey.png"],
    ),
    *[(named(name), None, [Turn("human", "<image>\nWhat?"), SHORT[1]], [name]) for name in ORDINARY_FILES],
]  # fmt: skip


def test_ordinary_variety_is_not_quarantined_and_its_bytes_come_out_unchanged(tmp_path):
    for name, data in ORDINARY_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    bytes_of = {**ORDINARY_FILES, "./a//b/./c/deep.png": ORDINARY_FILES["a/b/c/deep.png"]}
    lines = [json.dumps(record, ensure_ascii=False).encode() for record, *_ in ORDINARY]
    found, quarantine = prepared_of(tmp_path, [b"\xef\xbb\xbf" + lines[0], *lines[1:], b""], end=b"\r\n")
    assert quarantine == []
    assert found == [
        Sample(identity, f"set.jsonl#{row}", turns, [ImageFile(name, bytes_of[name]) for name in names])
        for row, (_, identity, turns, names) in enumerate(ORDINARY)
    ]
    assert len(ORDINARY) == 109
    assert {decode(data).mode for data in ORDINARY_FILES.values()} == {"RGB"}
