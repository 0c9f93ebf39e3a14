"""How do WebDataset tars become samples? Members that stand together and have one name up to its first dot are one.

0001.jpg 0001.txt            an image and its caption (.txt or .caption)
0002.0.jpg 0002.1.jpg ...    several images, in the order of their numbers
0003.webp 0003.json          caption or text, or LLaVA's conversations, in the .json; its other keys are not read
0004.txt                     text alone
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpa_ray.data import llava, rows
from dpa_ray.data.files import unsafe_name
from dpa_ray.data.images import MAX_BYTES
from dpa_ray.data.known import NOTHING, Known
from dpa_ray.data.listing import Files
from dpa_ray.data.llava import Unusable
from dpa_ray.data.records import MAX_RECORD_BYTES, NotJson, from_json
from dpa_ray.data.sample import Sample
from dpa_ray.data.sources import THREADS, Part, PartCutter, Rejected, Scan, checked, digest_of, to_sample
from dpa_ray.data.tar import Member, Tar
from dpa_ray.data.threads import ordered_map
from dpa_ray.errors import UserError
from dpa_ray.recipe import ColumnsSection

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
_TEXTS = ("txt", "caption")


@dataclass(frozen=True)
class _Group:
    """One sample's members, by their endings (lower case)."""

    key: str
    members: list[tuple[str, Member]]

    @property
    def start(self) -> int:
        return self.members[0][1].start

    @property
    def stop(self) -> int:
        return self.members[-1][1].stop


class WebDataset:
    """Tars: one, a pattern, a glob or a folder of them."""

    def __init__(self, uri: str, columns: ColumnsSection | None):
        self.files = Files(uri, ".tar")
        self.columns = columns or ColumnsSection()
        self.name = self.files.name

    def scan(self, known: Known = NOTHING) -> Scan:
        """Reads all members but images, of which sizes are enough."""
        content = hashlib.sha256()
        cutter = PartCutter()
        uris = self.files.uris()
        scans = ordered_map(lambda uri: known.get(uri, _scan_tar), uris, THREADS)
        for uri, found in zip(uris, scans, strict=True):
            content.update(f"{self.files.label(uri)}\0{found['digest']}\n".encode("utf-8", "surrogateescape"))
            cutter.next_file(uri)
            for start, stop in zip(found["starts"], found["stops"], strict=True):
                cutter.add(start, stop, stop - start)
        parts = cutter.finish()
        if not parts:
            raise UserError(f"{self.files.uri}: expected samples like 0001.jpg and 0001.txt, found none")
        columns = self.columns.model_dump(exclude_none=True)
        return Scan(digest_of({"webdataset": content.hexdigest(), "columns": columns}), cutter.num_rows, parts)

    def read(self, part: Part) -> Iterator[tuple[int, Sample | Rejected]]:
        with Tar(part.file) as tar:
            groups = enumerate(_groups(tar.members(part.start, part.stop)), part.first_row)
            read = ((row, self._read(tar, group, part)) for row, group in groups if part.wants(row))
            yield from ordered_map(lambda item: (item[0], _check(item[1])), read, THREADS)

    def _read(self, tar: Tar, group: _Group, part: Part) -> _Raw:
        """A sample's record and image bytes; the tar is read here, in order."""
        place = f"{self.files.label(part.file)}#{group.key}".encode("utf-8", "backslashreplace").decode()
        raw = _Raw(group.key, place, None, [])
        try:
            for _, member in group.members:
                _check_member(member)
            texts = {ending: _text(tar, member) for ending, member in self._texts(group)}
            images = sorted(self._each_once(self._images(group)), key=_image_order)
            meta = from_json(texts.pop("json")) if "json" in texts else {}
            if not isinstance(meta, dict):
                found = meta.detail if isinstance(meta, NotJson) else str(meta)[:40]
                raise Unusable("bad_record", f"{group.key}.json: expected a JSON object, found {found}")
            identity = meta.get(self.columns.id) if self.columns.id else llava.record_id(meta)
            raw.id = group.key if identity is None else str(identity)
            raw.record = self._record(raw.id, meta, texts, [member.name for _, member in images])
            raw.images = [tar.read(member) for _, member in images]
        except Unusable as err:
            raw.problem = err
        return raw

    def _texts(self, group: _Group) -> list[tuple[str, Member]]:
        wanted = (self.columns.text, self.columns.prompt)
        found = [(e, m) for e, m in group.members if _is_text(e) or e in [w.lower() for w in wanted if w]]
        return self._each_once(found)

    def _images(self, group: _Group) -> list[tuple[str, Member]]:
        pattern = self.columns.image
        if pattern is not None:
            return [(e, m) for e, m in group.members if fnmatch.fnmatchcase(e, pattern.lower())]
        return [(e, m) for e, m in group.members if e.rpartition(".")[2] in _IMAGES]

    def _each_once(self, found: list[tuple[str, Member]]) -> list[tuple[str, Member]]:
        """A member that was corrected by adding it again is another one, and the old one stays."""
        if len({ending for ending, _ in found}) < len(found):
            raise Unusable(
                "bad_record", f"expected each member once, found {', '.join(m.name for _, m in found)}"[:300]
            )
        return found

    def _record(self, identity: str, meta: dict[str, Any], texts: dict[str, str], names: list[str]) -> Any:
        columns = self.columns
        if columns.text is not None:
            found = {**meta, **texts}
            wanted = [columns.text, *([columns.prompt] if columns.prompt else [])]
            values = [found.get(name, found.get(name.lower())) for name in wanted]
            if None in values:
                missing = wanted[values.index(None)]
                raise Unusable(
                    "bad_record", f"expected {missing!r} as a member's ending or a key of its .json, found none"
                )
            return rows.caption_record(identity, values[0], names, values[1] if columns.prompt else None)
        key = columns.conversations or rows.find_name(meta, rows.CONVERSATIONS)
        if key is not None:
            return rows.conversation_record(identity, meta.get(key), names)
        if len(texts) > 1:
            raise Unusable("bad_record", f"expected one caption, found {' and '.join(texts)}: name one by columns.text")
        for text in texts.values():
            return rows.caption_record(identity, text, names)
        key = rows.find_name(meta, rows.CAPTIONS)
        if key is None:
            raise Unusable(
                "bad_record",
                "expected a .txt, a .caption, or a .json with caption, text or conversations next to it in the tar, "
                f"found {len(names)} images alone",
            )
        return rows.caption_record(identity, meta[key], names)


def _scan_tar(uri: str) -> dict[str, Any]:
    """What names a tar's content, and the bytes where each sample starts and stops."""
    content, starts, stops = hashlib.sha256(), [], []
    with Tar(uri) as tar:
        for group in _groups(tar.members()):
            for ending, member in group.members:
                content.update(f"{member.name}\0{member.kind}\0{member.size}\n".encode("utf-8", "surrogateescape"))
                is_image = ending.rpartition(".")[2] in _IMAGES
                if not is_image and member.kind == "file" and member.size <= MAX_RECORD_BYTES:
                    content.update(tar.read(member))
            starts.append(group.start)
            stops.append(group.stop)
    return {"digest": content.hexdigest(), "starts": starts, "stops": stops}


@dataclass
class _Raw:
    """A sample's bytes, not looked at yet."""

    id: str | None
    place: str
    record: Any
    images: list[bytes]
    problem: Unusable | None = None


def _check(raw: _Raw) -> Sample | Rejected:
    if raw.problem is not None:
        identity = llava.record_id({"id": raw.id})
        return Rejected(identity, raw.place, raw.problem.reason, raw.problem.detail)
    return to_sample(raw.record, raw.place, lambda index, name: checked(name, raw.images[index]))


def _groups(members: Iterator[Member]) -> Iterator[_Group]:
    """Samples in the order of the tar. Folders, hidden files and files without an ending belong to none."""
    group: _Group | None = None
    for member in members:
        found = _NAME.fullmatch(member.name.removeprefix("./"))
        if member.kind == "folder" or found is None:
            continue
        key, ending = found.group(1), found.group(2).lower()
        if group is not None and group.key == key:
            group.members.append((ending, member))
            continue
        if group is not None:
            yield group
        group = _Group(key, [(ending, member)])
    if group is not None:
        yield group


def _check_member(member: Member) -> None:
    """Raises: Unusable for what no sample may be made of."""
    problem = unsafe_name(member.name)
    if member.kind != "file":
        problem = f"expected a plain file, found {member.kind}"
    if problem is not None:
        raise Unusable("unsafe_member", f"{member.name[:200]!r}: {problem}")
    if member.size > MAX_BYTES:
        raise Unusable("image_size", f"{member.name[:200]!r}: expected at most {MAX_BYTES} bytes, found {member.size}")


def _is_text(ending: str) -> bool:
    return ending == "json" or ending.rpartition(".")[2] in _TEXTS


def _text(tar: Tar, member: Member) -> str:
    if member.size > MAX_RECORD_BYTES:
        found = f"expected at most {MAX_RECORD_BYTES} bytes of text, found {member.size}"
        raise Unusable("bad_record", f"{member.name[:200]!r}: {found}")
    try:
        return tar.read(member).decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise Unusable("not_utf8", f"{member.name[:200]!r}: expected UTF-8, found other bytes at {err.start}") from None


def _image_order(item: tuple[str, Member]) -> tuple[Any, ...]:
    """`jpg` first, then 0.jpg, 2.jpg, 10.jpg, then others by name."""
    stem = item[0].rpartition(".")[0]
    return (stem != "", not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem, item[1].start)
