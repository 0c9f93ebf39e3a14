"""What can be wrong with a sample, and what is ordinary variety: tables of LLaVA records with their image files."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Q, A = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}
TEXT_Q = {"from": "human", "value": "What?"}
GOOD = "good.png"


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    """A picture of coarse noise, so that files are long enough to be cut."""
    colours = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(colours)
    file = io.BytesIO()
    (image if mode == "RGB" else image.convert(mode)).save(file, form, **options)
    return file.getvalue()


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def _images() -> list[tuple[str, str, bytes]]:
    """(name, reason, bytes)."""
    png, jpeg, gif, webp, bmp, tiff = (encoded(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"))
    table = [
        (f"cut-{kind}-{share}.{kind}", "image_truncated", data[: int(len(data) * share)])
        for kind, data in (("png", png), ("jpg", jpeg), ("webp", webp), ("bmp", bmp))
        for share in (0.5, 0.8, 0.95)
    ]
    table += [
        (f"magic-only-{kind}", "image_truncated", data[:12])
        for kind, data in (("png", png), ("jpg", jpeg), ("gif", gif), ("webp", webp))
    ]
    texts = {
        "html.jpg": b"<!DOCTYPE html><html><body>404</body></html>", "json.png": b'{"error": "AccessDenied"}',
        "xml.png": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "svg.png": b"<svg xmlns='x'></svg>",
        "text.jpg": b"not an image", "pdf.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + b"0" * 99,
        "zip.png": b"PK\x03\x04" + b"\0" * 60, "gzip.png": b"\x1f\x8b\x08" + b"\0" * 60, "elf.png": b"\x7fELF" + b"\0" * 60,
        "zeros.png": bytes(4096), "spaces.jpg": b" " * 512, "newline.jpg": b"\n", "one-byte.jpg": b"\xff",
        "mp4.jpg": b"\0\0\0\x18ftypmp42" + bytes(64), "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "base64.png": b"iVBORw0KGgoAAAA",
        "shifted.png": b"\n" + png, "psd.png": b"8BPS\0\1" + bytes(40), "wasm.png": b"\0asm" + bytes(60),
    }  # fmt: skip
    table += [(name, "image_not_an_image", data) for name, data in texts.items()]
    table += [(f"empty{suffix}", "image_empty", b"") for suffix in (".jpg", ".png", ".webp", ".gif", "")]
    table += [
        ("anim.gif", "image_animated", animated("GIF")), ("anim.webp", "image_animated", animated("WEBP")),
        ("anim.png", "image_animated", animated("PNG")),
        ("bomb.png", "image_bomb", png_header(60_000, 60_000)), ("bomb-grey.png", "image_bomb", png_header(10_000, 10_000, 8, 0)),
        ("wide.png", "image_size", png_header(20_000, 200)), ("high.png", "image_size", png_header(200, 20_000)),
        ("ratio.png", "image_size", encoded("PNG", size=(900, 2))), ("ratio2.jpg", "image_size", encoded("JPEG", size=(1, 401))),
        ("crc.png", "image_corrupt", flipped(png, len(png) // 2)),
        ("quantisation.jpg", "image_corrupt", jpeg.replace(b"\xff\xdb", b"\xff\xfe")),
    ]  # fmt: skip
    return table


def _records() -> list[tuple[str, str, Any]]:
    """(name, reason, record or what stands for one)."""
    good = {"image": GOOD, "conversations": [Q, A]}

    def change(**values: Any) -> dict[str, Any]:
        return {**good, **values}

    def turns(*roles: str) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": "x"} for role in roles]}

    def counted(question: str, answer: str, image: Any) -> dict[str, Any]:
        return {"image": image, "conversations": [{**Q, "value": question}, {**A, "value": answer}]}

    wrong = {
        "null": None,
        "text": "x",
        "number": 7,
        "float": 1.5,
        "true": True,
        "list": [1],
        "empty-list": [],
        "empty": {},
    }
    table: list[tuple[str, str, Any]] = [(f"record-{name}", "bad_record", value) for name, value in wrong.items()]
    table += [(f"conversations-{n}", "bad_record", change(conversations=v)) for n, v in {**wrong, "list": [1]}.items()]
    table += [
        (f"turn-{name}", "bad_record", change(conversations=[Q, turn]))
        for name, turn in {
            "null": None, "text": "x", "list": [], "without-value": {"from": "gpt"}, "without-role": {"value": "x"},
            "null-value": {"from": "gpt", "value": None}, "list-value": {"from": "gpt", "value": ["x"]},
            "number-value": {"from": "gpt", "value": 3}, "null-role": {"from": None, "value": "x"},
        }.items()
    ]  # fmt: skip
    table += [
        (f"image-{name}", "bad_record", change(image=value))
        for name, value in {
            "number": 3,
            "true": True,
            "object": {"path": GOOD},
            "nested": [[GOOD]],
            "null-in": [None],
        }.items()
    ]
    roles = [
        ("gpt", "human"), ("human", "human", "gpt"), ("human", "gpt", "gpt"), ("human", "gpt", "system"),
        ("system", "system", "human", "gpt"), ("system", "gpt"), ("human", "bing"), ("Human", "gpt"), ("human", "tool", "gpt"),
        ("", "gpt"), ("human", "gpt", "human", "human"),
    ]  # fmt: skip
    table += [(f"roles-{'-'.join(r)}", "roles", turns(*r)) for r in roles]
    table += [
        (f"answer-{name}", "no_assistant_text", {"conversations": [TEXT_Q, {**A, "value": text}]})
        for name, text in {"empty": "", "blank": "  \n\t", "nbsp": "\u00a0"}.items()
    ]
    table += [("no-answer", "no_assistant_text", {"conversations": [TEXT_Q]})]
    table += [("only-system", "no_assistant_text", turns("system"))]
    table += [
        ("count-0-of-1", "image_count", counted("What?", "x", GOOD)),
        ("count-2-of-1", "image_count", counted("<image><image>", "x", GOOD)),
        ("count-1-of-0", "image_count", counted("<image>", "x", None)),
        ("count-1-of-0-list", "image_count", counted("<image>", "x", [])),
        ("count-1-of-2", "image_count", counted("<image>", "x", [GOOD, GOOD])),
        ("count-3-of-2", "image_count", counted("<image><image>", "<image>", [GOOD, GOOD])),
        ("count-case", "image_count", counted("<IMAGE>", "x", GOOD)),
        ("count-answer-too", "image_count", counted("<image>", "An <image>", GOOD)),
    ]  # fmt: skip
    unsafe = {
        "absolute": "/etc/hostname", "up": "../good.png", "up-inside": "a/../../good.png", "up-end": "a/..",
        "windows": "C:\\good.png", "drive": "c:/good.png", "share": "\\\\host\\good.png", "backslash-up": "..\\good.png",
        "http": "http://example.com/a.png", "s3": "s3://bucket/a.png", "file": "file:///etc/hostname", "nul": "good.png\0",
    }  # fmt: skip
    table += [(f"name-{name}", "unsafe_image_name", change(image=value)) for name, value in unsafe.items()]
    missing = {
        "none": "none.png", "empty": "", "folder": "folder", "dot": ".", "inside-file": "good.png/x.png", "case": "GOOD.png",
        "long": "x" * 300 + ".png", "blank": " good.png", "percent": "good%2Epng", "slash": "folder/", "unicode": "ü.png",
        "star": "*.png", "second": ["good.png", "none.png"],
    }  # fmt: skip
    for name, value in missing.items():
        conversations = [{**Q, "value": "<image>" * (len(value) if isinstance(value, list) else 1)}, A]
        table.append((f"missing-{name}", "image_missing", {"image": value, "conversations": conversations}))
    lone = "caf\udce9"  # as a JSON escape: no UTF-8 can say it
    table += [
        ("utf8-answer", "not_utf8", change(conversations=[Q, {**A, "value": lone}])),
        ("utf8-question", "not_utf8", change(conversations=[{**Q, "value": f"<image>{lone}"}, A])),
        ("utf8-image", "not_utf8", change(image=lone)), ("utf8-id", "not_utf8", change(id=lone)),
    ]  # fmt: skip
    return table


def broken() -> tuple[list[tuple[str, str, Any]], dict[str, bytes]]:
    """((name, reason, record), files by name). A record that can have one has its name as id."""
    files = {GOOD: encoded("PNG"), "folder/x.png": encoded("PNG")}
    table: list[tuple[str, str, Any]] = []
    for name, reason, data in _images():
        files[name] = data
        table.append((name, reason, {"id": name, "image": name, "conversations": [Q, A]}))
    for name, reason, record in _records():
        has_turns = isinstance(record, dict) and "conversations" in record
        table.append((name, reason, {"id": name, **record} if has_turns else record))
    return table, files


def ordinary() -> tuple[list[tuple[str, Any]], dict[str, bytes]]:
    """((name, record), files): what looks odd and is fine."""
    deep = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 170
    grey16 = io.BytesIO()
    Image.fromarray(deep).save(grey16, "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "cmyk.jpg": encoded("JPEG", "CMYK"), "palette.png": encoded("PNG", "P"), "alpha.png": encoded("PNG", "RGBA"),
        "grey.png": encoded("PNG", "L"), "grey-alpha.png": encoded("PNG", "LA"), "bits.png": encoded("PNG", "1"),
        "deep.png": grey16.getvalue(), "exif.jpg": encoded("JPEG", exif=turned.tobytes()), "webp.webp": encoded("WEBP"),
        "lossless.webp": encoded("WEBP", lossless=True), "UPPER.JPG": encoded("JPEG"), "Mixed.PnG": encoded("PNG"),
        "narrow.png": encoded("PNG", size=(1, 9)), "one.png": encoded("PNG", size=(1, 1)), "still.gif": encoded("GIF"),
        "progressive.jpg": encoded("JPEG", progressive=True), "bmp.bmp": encoded("BMP"), "tiff.tif": encoded("TIFF"),
        "png-called.jpg": encoded("PNG"), "no-suffix": encoded("JPEG"), "sub dir/a b.png": encoded("PNG"),
        "东京.png": encoded("PNG"), "a#b?c&d.png": encoded("PNG"), "tail.jpg": encoded("JPEG") + b"\0" * 40,
        "..dots.png": encoded("PNG"), "ratio200.png": encoded("PNG", size=(200, 1)), GOOD: encoded("PNG"),
    }  # fmt: skip
    table: list[tuple[str, Any]] = [(n, {"id": n, "image": n, "conversations": [Q, A]}) for n in files]
    image = {"image": GOOD, "conversations": [Q, A]}
    table += [
        ("repeats", {"id": GOOD, **image}), ("absent", image), ("null", {"id": None, **image}), ("int", {"id": 17, **image}),
        ("empty id", {"id": "", **image}), ("list of one", {**image, "image": [GOOD]}), ("dotted", {**image, "image": f"./{GOOD}"}),
        ("further keys", {**image, "source": "x", "width": 3}), ("text only", {"conversations": [TEXT_Q, A]}),
        ("null image", {"image": None, "conversations": [TEXT_Q, A]}), ("no images", {"image": [], "conversations": [TEXT_Q, A]}),
        ("system", {"conversations": [{"from": "system", "value": "Be brief."}, TEXT_Q, A]}),
        ("openai", {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}),
        ("ends with human", {"conversations": [TEXT_Q, A, TEXT_Q]}),
        ("image last", {"image": GOOD, "conversations": [{**Q, "value": "What?\n<image>"}, A]}),
        ("image alone", {"image": GOOD, "conversations": [{**Q, "value": "<image>"}, A]}),
        ("crlf", {"conversations": [{**TEXT_Q, "value": "a\r\nb"}, {**A, "value": "c\r\n"}]}),
        ("emoji", {"conversations": [TEXT_Q, {**A, "value": "👩‍👩‍👧 ﷽ \u200b\u202e"}]}),
        ("an empty answer among others", {"conversations": [TEXT_Q, {**A, "value": ""}, TEXT_Q, A]}),
        ("twice the same", {"image": [GOOD, GOOD], "conversations": [{**Q, "value": "<image><image>"}, A]}),
    ]  # fmt: skip
    return table, files
