"""How do sections become one HTML file? Styles, scripts and data inside; nothing is loaded from anywhere.

Everything from data goes through Jinja's escaping, or into JSON without angle brackets. Should a text get past that,
the page's content security policy runs no script but the page's own, and lets nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import jinja2

from dpa_ray.report.figures import Cell, Figure

LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
"""Of https://vega.github.io, in the order in which they need each other; their licences are beside them."""


@dataclass(frozen=True)
class Table:
    """A table; with `is_sortable`, by any column; with `is_folded`, shown when it is asked for."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    is_sortable: bool = True
    is_folded: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure in its place."""

    kind: ClassVar[str] = "figure"
    figure: Figure


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    kind: ClassVar[str] = "facts"
    rows: list[tuple[str, str]]
    details: list[tuple[str, str]] = field(default_factory=list)  # (summary, text): long ones, folded away


@dataclass(frozen=True)
class Token:
    """A token as it is shown. `shade` is 0..1, or None where it is no target."""

    text: str
    shade: float | None
    weight: float | None
    gain: float | None
    is_visual: bool


@dataclass(frozen=True)
class Shaded:
    """A sample with its tokens shaded, by each run that shows it."""

    kind: ClassVar[str] = "shaded"
    title: str
    pictures: Sequence[str]  # data URIs
    texts: list[tuple[str, list[Token]]]  # (name of the run, tokens)
    num_more: int = 0  # pictures that are not shown


@dataclass(frozen=True)
class Asked:
    """The held-out questions on one sample: (question, truth, (answer, is it right) by each run)."""

    kind: ClassVar[str] = "asked"
    title: str
    pictures: Sequence[str]
    runs: tuple[str, ...]
    rows: list[tuple[str, str, list[tuple[str, bool]]]]
    num_more: int = 0  # pictures that are not shown


Block = Table | Drawing | Facts | Shaded | Asked


@dataclass(frozen=True)
class Section:
    """A part of the page; without blocks, `note` says why there is nothing."""

    name: str
    title: str
    blocks: list[Block]
    note: str = ""


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page."""
    specs = {b.figure.name: b.figure.spec for s in sections for b in s.blocks if isinstance(b, Drawing)}
    libraries = [_library(name) for name in LIBRARIES] if specs else []
    scripts = [*libraries, _asset("report.js")]
    return _template().render(
        title=title, subtitle=subtitle, sections=sections, style=_asset("report.css"),
        scripts=scripts, specs=as_json(specs),
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "script-src " + " ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
    )  # fmt: skip


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def shown(value: Cell) -> str:
    """A cell as it is read."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sort_key(value: Cell) -> str:
    """What a sortable cell says of itself to the page's script: a number, or nothing."""
    return repr(float(value)) if isinstance(value, int | float) else ""


def number_columns(rows: Sequence[Sequence[Cell]]) -> list[int]:
    """Those whose cells are numbers, but for cells without a value."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [i for i, found in enumerate(columns) if found and all(isinstance(v, int | float) for v in found)]


def _asset(name: str) -> str:
    return files("dpa_ray.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _library(name: str) -> str:
    """Its text, without what leads a browser's developer tools to a file that is not there."""
    return re.sub(r"\n//# sourceMappingURL=.*", "", _asset(name)).strip()


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_asset),
    )  # fmt: skip
    environment.filters |= {"shown": shown, "sort_key": sort_key, "number_columns": number_columns}
    return environment.get_template("report.html.j2")
