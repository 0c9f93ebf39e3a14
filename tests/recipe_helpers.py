"""What several tests of recipes need: the smallest recipe, one on disk, and the errors of a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.recipe import RecipeError

SMALLEST: dict[str, Any] = {
    "name": "small",
    "model": {"llm": "builtin:tiny-llm", "vision": "builtin:tiny-vit"},
    "data": {"pretrain": {"source": "a.json"}, "instruct": {"source": "builtin:shapes"}},
}


def written(folder: Path, text: str) -> str:
    """The path of a recipe file with this text."""
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def errors_of(call: Callable[[], Any]) -> dict[str, str]:
    """Key path -> message of the RecipeError that `call` must raise."""
    with pytest.raises(RecipeError) as caught:
        call()
    return dict(caught.value.errors)
