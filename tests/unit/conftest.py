"""What several unit tests are given: small models in folders, pictures, and a small recipe to be overridden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the fixtures import what is heavy themselves, as in tests/conftest.py
    from dpa_ray.recipe import Recipe


@pytest.fixture(scope="session")
def llm_folder(tiny_llm: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_llm`, hardly fitted: for tests to which no probability matters."""
    return lambda family, **options: tiny_llm(family, num_steps=1, **options)


@pytest.fixture(scope="session")
def pictures(assets_dir: Path) -> list[Any]:
    """PIL images: wide, high, grey and with alpha."""
    from PIL import Image

    from tests.tiny_models import make_images

    folder = assets_dir / "pictures"
    opened = [Image.open(folder / name) for name in make_images(folder, 6)]
    assert {p.mode for p in opened} >= {"RGB", "L", "RGBA"}
    assert {p.width > p.height for p in opened} == {True, False}
    return opened


@pytest.fixture(scope="session")
def models(llm_folder: Callable[..., Path], tiny_tower: Callable[..., Path]) -> dict[str, str]:
    """Folders of a Llama and a CLIP tower, and of others like them."""
    return {
        "llm": str(llm_folder("llama", reserved="none")), "other_llm": str(llm_folder("llama", seed=1)),
        "vision": str(tiny_tower("clip")), "other_vision": str(tiny_tower("clip", seed=1)),
    }  # fmt: skip


@pytest.fixture
def recipe(models: dict[str, str], tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe("method=pmo", "stages.instruct.lr=1")`: a small one with overrides, in a store of this test's own."""
    from dpa_ray.recipe import parse
    from dpa_ray.recipe_yaml import apply_override

    def make(*overrides: str) -> Recipe:
        shapes = {"source": "builtin:shapes"}
        values: dict[str, Any] = {
            "name": "small", "store": str(tmp_path / "store"), "precision": "fp32",
            "model": {"llm": models["llm"], "vision": models["vision"]},
            "data": {
                "pretrain": {**shapes, "options": {"style": "ornate", "size": 10}},
                "instruct": {**shapes, "options": {"style": "qa", "size": 9, "seed": 1}},
                "eval": {**shapes, "options": {"style": "qa", "split": "heldout", "size": 4}},
            },
            "stages": {s: {"global_batch_size": 4} for s in ("proxy_llm", "proxy_mllm", "instruct")},
            "cluster": {"workers": 1, "gpus_per_worker": 0},
        }  # fmt: skip
        for override in overrides:
            error = apply_override(values, override)
            assert error is None, error
        return parse(values)

    return make
