"""Which keys has a recipe, with which defaults and meanings? jobs/recipes/README.md, made from the schema (`make schema`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

HEAD = """# All recipe keys

Made from dpa_ray/recipe.py by `make schema`, as is [recipe.schema.json](recipe.schema.json), which editors read. A key that is
not here is an error. `python jobs/run_dpa.py RECIPE --dry-run` prints a recipe with every default filled in.
"""

ROOT = "Recipe"

MOST_NAMED = 5
"""Places of a section in its heading."""


def table(schema: dict[str, Any]) -> str:
    """Markdown: a table for each section of a recipe's JSON schema, told once with all the places that it stands at."""
    sections = {ROOT: schema, **schema["$defs"]}
    places: dict[str, list[str]] = {}
    _place(ROOT, "", sections, places)
    parts = [HEAD]
    for name, paths in places.items():
        if paths != [""]:
            parts.append(f"## {_heading(paths)}\n")
        rows = [_row(key, found, key in sections[name].get("required", ())) for key, found in _keys(sections[name])]
        parts.append("\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _heading(paths: list[str]) -> str:
    named = paths if len(paths) <= MOST_NAMED else paths[:2]
    rest = f", and {len(paths) - len(named)} alike" if len(named) < len(paths) else ""
    return ", ".join(f"`{path}`" for path in named) + rest


def _keys(section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from section["properties"].items()


def _place(name: str, path: str, sections: dict[str, Any], places: dict[str, list[str]]) -> None:
    """Note that section `name` stands at `path`, and those in it, the outer ones first."""
    places.setdefault(name, []).append(path)
    for key, found in _keys(sections[name]):
        for inner, ending in _sections_in(found):
            _place(inner, f"{path}.{key}{ending}".removeprefix("."), sections, places)


def _sections_in(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The sections that a key's value may be or hold, and how the path goes on to them."""
    if "$ref" in found:
        yield found["$ref"].rpartition("/")[2], ""
    for kind in (*found.get("anyOf", ()), *found.get("oneOf", ())):
        yield from _sections_in(kind)
    for key, ending in (("items", ".N"), ("additionalProperties", ".NAME")):
        if isinstance(found.get(key), dict):
            yield from ((name, ending + rest) for name, rest in _sections_in(found[key]))


def _row(key: str, found: dict[str, Any], is_required: bool) -> str:
    default = "-" if is_required else _default(found)
    cells = (f"`{key}`", default, _values(found), found.get("description", ""))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(found: dict[str, Any]) -> str:
    """As JSON; `-` of a section, which has its own defaults, and of what is worked out."""
    if "default" in found:
        return f"`{json.dumps(found['default'])}`"
    return {"array": "`[]`", "object": "`{}`"}.get(str(found.get("type")), "-")


def _values(found: dict[str, Any]) -> str:
    """What may be written, in a user's words."""
    kinds = [*found.get("anyOf", ()), *found.get("oneOf", ())]
    if kinds:
        return ", ".join(dict.fromkeys(_values(kind) for kind in kinds))
    if "enum" in found:
        return ", ".join(str(value) for value in found["enum"])
    if "$ref" in found:
        return "section"
    words = {"boolean": "true, false", "string": "text", "object": "section", "array": "list"}
    kind = str(found.get("type", "any"))
    return words.get(kind, kind) + _range(found)


def _range(found: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return "".join(
        f" {sign} {found[name]:g}" for name, sign in signs.items() if name in found and found[name] < 2**31 - 1
    )
