"""How recipe text becomes plain values: YAML without its surprises, and `key.path=value` overrides on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpa_ray.recipe_errors import RecipeError, shown

STRING_TAG = "tag:yaml.org,2002:str"
MERGE_TAG = "tag:yaml.org,2002:merge"
TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
FLOAT_TAG = "tag:yaml.org,2002:float"

OF_A_SOURCE = ("images", "format", "columns", "options")
"""Keys that belong to a source of data, beside it."""

LABELS = ("cluster.label_selector", "cluster.fallback_label_selector")
"""Sections whose keys are labels, which may have dots and a slash."""

MAX_INTEGER = 2**63
"""No setting is near it; beyond some 4,300 digits Python refuses to print an integer."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 4e-5 as a number (YAML 1.1 wants a dot and a sign) and a date as the text it is.

    A key that stands twice, or that is no name, is an error. It is looked for while composing: constructing comes after
    merge keys (`<<: *other`) were spread, where an own key rightly stands beside the merged one.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == MERGE_TAG:
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != STRING_TAG:
                found = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise yaml.YAMLError(f"line {line}: expected a name as key, found {found}")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        value: int = super().construct_yaml_int(node)
        if abs(value) >= MAX_INTEGER:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: expected a number below 2**63, found one beyond")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    FLOAT_TAG,
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def from_yaml(text: str) -> Any:
    """The value of a YAML text. Raises: ValueError with one line that says what is wrong and where."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # PyYAML's constructors let Python's own errors through where a tag does not fit its text (`!!int x`, `0b_`).
    except (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError) as err:
        raise ValueError(" ".join(str(err).split())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file (UTF-8, with or without BOM) holds. Raises: RecipeError."""
    try:
        values = from_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as err:
        raise RecipeError([("", f"not readable as YAML: {err}")], str(path)) from None
    if not isinstance(values, dict):
        raise RecipeError([("", f"expected a mapping of keys, found {shown(values)}")], str(path))
    return values


def kept_beside_source(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """By section: what to say where an override replaces its `source` and what the recipe (`values`) says beside it does not
    fit the new one: the user did not type that, and has to leave it out."""
    typed = {override.partition("=")[0] for override in overrides}
    told = {}
    for section in sorted(path.removesuffix(".source") for path in typed if path.endswith(".source")):
        here: Any = values
        for key in section.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        own = [k for k in OF_A_SOURCE if isinstance(here, dict) and here.get(k) is not None]
        left = [
            f"{section}.{key}" for key in own if not any(f"{path}.".startswith(f"{section}.{key}.") for path in typed)
        ]
        if left:
            told[section] = (
                f"; {', '.join(left)} comes from the recipe, whose source was replaced: leave it out with "
                f"{' '.join(f'{path}=null' for path in left)}"
            )
    return told


def apply_override(values: dict[str, Any], override: str) -> tuple[str, str] | None:
    """Set one `key.path=value` in `values`, sections on the way made where there are none; returns the error, if any.

    The value is YAML; nothing after the `=` means null.
    """
    path, sep, text = override.partition("=")
    for section in LABELS:
        label = path.removeprefix(f"{section}.")
        if sep and label != path and re.search(r"[./]", label):
            found = f"expected a label with '.' or '/' in braces, as '{section}={{{label}: {text}}}'"
            return (section, f"{found}, found {override!r}")
    if not sep or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", path):
        return ("", f"expected key.path=value, found {override!r}")
    try:
        value = from_yaml(text)
    except ValueError as err:
        return (path, f"expected a YAML value, found {text!r}: {err}")
    here = values
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        child = {} if here.get(key) is None else here[key]
        if not isinstance(child, dict):
            return (path, f"expected {'.'.join(parents[: depth + 1])} to be a section, found {shown(child)}")
        here[key] = dict(child)  # a copy: an anchored section may stand in other places too
        here = here[key]
    here[last] = value
    return None
