"""Which files does a URI name? One file, `{0000..0012}` and `{a,b}`, a glob, or a folder; local or S3."""

from __future__ import annotations

import fnmatch
import re
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from dpa_ray.data.files import absolute, asked, is_remote
from dpa_ray.data.retry import first_line
from dpa_ray.errors import UserError

MAX_FILES = 1_000_000
"""More than any source has: bounds what a mistyped `{0..99999999}` makes."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_PATTERN = re.compile(r"[*?\[{]")


class Files:
    """The files that `uri` names, those of a folder by `suffix`. Picklable."""

    def __init__(self, uri: str, suffix: str):
        self.uri, self.suffix = absolute(uri), suffix
        folder, _, name = self.uri.rpartition("/")
        is_pattern = _PATTERN.search(self.uri) is not None
        is_file = name.lower().endswith(suffix) and not is_pattern
        self.name = name if is_file else ""
        """What comes before the place of a sample: the file's name, or nothing, where `label` tells the files apart."""
        self.folder = (folder or "/") if is_file or is_pattern else self.uri
        while _PATTERN.search(self.folder):
            self.folder = self.folder.rpartition("/")[0]

    def uris(self) -> list[str]:
        """The URIs, those of a pattern in its order, else sorted. Raises: UserError where there is none."""
        found: dict[str, None] = {}
        for pattern in expand_braces(self.uri):
            found.update(dict.fromkeys(self._matches(pattern)))
        return list(found)

    def label(self, uri: str) -> str:
        """Which of the files, in a sample's place: nothing where there is but one."""
        return "" if uri == self.uri else uri.removeprefix(self.folder.rstrip("/") + "/")

    def _matches(self, pattern: str) -> list[str]:
        try:
            return asked(pattern, lambda system, path: self._find(pattern, system, path))
        except OSError as err:
            raise UserError(f"{pattern} cannot be read: {first_line(err)}") from None

    def _find(self, pattern: str, system: Any, path: str) -> list[str]:
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            return [pattern]
        if info.type == fs.FileType.Directory:
            found = [p for p in _list(system, path, recursive=True) if p.lower().endswith(self.suffix)]
            expected = f"a {self.suffix} file in it"
        elif re.search(r"[*?\[]", path):
            found, expected = _glob(system, path), "a file that it names"
        else:
            raise UserError(f"expected a file or folder at {pattern}, found nothing")
        if not found:
            raise UserError(f"{pattern}: expected {expected}, found none")
        scheme = f"{pattern.partition('://')[0]}://" if is_remote(pattern) else ""
        return [f"{scheme}{p}" for p in sorted(found)]


def expand_braces(text: str) -> list[str]:
    """`a{0..2}` -> a0, a1, a2 (with the zeros of the first number), `{x,y}` -> x, y; several braces: every combination.

    Raises: UserError where a range falls or names too many files.
    """
    out = [text]
    while any(_BRACES.search(item) for item in out):
        expanded: list[str] = []
        for item in out:
            found = _BRACES.search(item)
            if found is None:
                expanded.append(item)
                continue
            expanded += [item[: found.start()] + value + item[found.end() :] for value in _values(found.group(1))]
            if len(expanded) > MAX_FILES:
                raise UserError(f"{text}: expected at most {MAX_FILES:,} files, found more")
        out = expanded
    return out


def _values(inner: str) -> list[str]:
    found = _RANGE.fullmatch(inner)
    if found is None:
        return inner.split(",")
    first, last = int(found.group(1)), int(found.group(2))
    if last < first or last - first > MAX_FILES:
        raise UserError(f"expected a range like {{0000..0012}}, found {{{inner}}}")
    return [f"{i:0{len(found.group(1))}}" for i in range(first, last + 1)]


def _list(system: Any, folder: str, *, recursive: bool) -> list[str]:
    infos = system.get_file_info(fs.FileSelector(folder, recursive=recursive, allow_not_found=True))
    return [info.path for info in infos if info.type == fs.FileType.File]


def _glob(system: Any, path: str) -> list[str]:
    parts = PurePosixPath(path).parts
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    folder = str(PurePosixPath(*parts[:fixed])) if fixed else ""
    if not folder:
        raise UserError(f"expected a bucket's name before the first * of a pattern, found {path}")
    found = []
    for candidate in _list(system, folder, recursive=fixed + 1 < len(parts)):
        names = PurePosixPath(candidate).parts
        if len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names[fixed:], parts[fixed:])):
            found.append(candidate)
    return found
