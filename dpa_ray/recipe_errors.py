"""How a wrong recipe is told: every error with its key path, what was expected and what was found."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from dpa_ray.credentials import has_credentials, without_credentials


class RecipeError(Exception):
    """The recipe or an override is wrong; `errors` holds (key path, message) pairs, all of them."""

    def __init__(self, errors: list[tuple[str, str]], where: str = "recipe"):
        self.errors = errors = [(path, without_credentials(message)) for path, message in errors]
        lines = "\n".join(f"  {path}: {message}" if path else f"  {message}" for path, message in errors)
        super().__init__(f"{where}: {len(errors)} error{'s' if len(errors) != 1 else ''}\n{lines}")


KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (dict, "section"),
    ((list, tuple), "list"),
)
"""What a user calls a value's type; the first that fits."""


def shown(value: Any) -> str:
    """A value for a message: its type and, cut to a line, the value."""
    kind = next((name for types, name in KINDS if isinstance(value, types)), type(value).__name__)
    if value is None:
        return kind
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):  # a section that contains itself, an integer too long to print
        return kind
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"


EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "dict_type": "a section",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "string_too_short": "a text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', a letter or digit first",
    "too_long": "{max_length} values",
    "too_short": "a list that is not empty",
}
"""What was expected, by pydantic's error type, with its context filled in."""


def message(error: Any, recipe: type[BaseModel]) -> str:
    """One error of pydantic's in validating a `recipe` as `expected ..., found ...`."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"], recipe)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown key{hint}; expected one of {', '.join(known)}, found {shown(value)}"
    if kind == "missing":
        return "expected a value, found none"
    if kind == "value_error":
        return str(context["error"])
    expected = EXPECTED[kind].format(**context) if kind in EXPECTED else error["msg"].removeprefix("Input should be ")
    hint = " (put it in quotes)" if kind == "string_type" and isinstance(value, (bool, int, float)) else ""
    return f"expected {expected}, found {shown(value)}{hint}"


def credentials_in(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """An error for every text under `value` that holds an address with a user and password: a recipe is written into the
    store, and sent to trackers."""
    if isinstance(value, str) and has_credentials(value):
        hint = "give them in the environment (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_USERNAME, ...)"
        return [(path, f"expected an address without user and password, found {without_credentials(value)!r}; {hint}")]
    if depth > 20:  # a section that contains itself; nothing of a recipe lies as deep
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [e for key, item in pairs for e in credentials_in(item, f"{path}.{key}" if path else str(key), depth + 1)]


def key_path(loc: tuple[Any, ...]) -> str:
    """A pydantic error's place as a user writes it: without the tags of the alternatives (`<uri>`) of a key."""
    return ".".join(str(part) for part in loc if not _is_tag(part))


def _is_tag(part: Any) -> bool:
    return isinstance(part, str) and part.startswith("<")


def _known_keys(loc: tuple[Any, ...], recipe: type[BaseModel]) -> list[str]:
    """The keys of the section that the last key of `loc` (a pydantic error's) was looked for in."""
    here: Any = recipe
    for key in loc[:-1]:
        if isinstance(key, int) or _is_tag(key):  # an entry of a list: `here` is the entries' section already
            continue
        if get_origin(here) is dict:
            here = get_args(here)[1]
            continue
        annotation = {f.alias or n: f.annotation for n, f in here.model_fields.items()}[key]
        here = annotation if get_origin(annotation) is dict else _section_in(annotation) or annotation
    return [f.alias or n for n, f in here.model_fields.items()] if _is_section(here) else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """X out of X, X | None or str | list[X]."""
    if _is_section(annotation):
        return annotation
    return next((found for a in get_args(annotation) if (found := _section_in(a))), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
