"""What several unit tests are given: small models in folders, pictures, and a small recipe to be overridden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the fixtures import what is heavy themselves, as in tests/conftest.py
    from dpa_ray.recipe import Recipe
    from dpa_ray.store import Store
    from tests.s3 import S3
    from tests.s3_proxy import Proxy


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


@pytest.fixture
def proxy(rclone_s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of rclone, for clients that give a call up after one failure, or two seconds."""
    from dpa_ray.data import retry
    from dpa_ray.store import s3_client
    from tests.s3_proxy import forget_clients, running_proxy

    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.05)
    for patience in ("brief", "usual", "long"):
        monkeypatch.setitem(s3_client.LIMITS, patience, (2, 2, 1))  # type: ignore[misc]
    for name, value in {"CONNECT_S": 2, "STALLED_S": 2, "ATTEMPTS": 1}.items():
        monkeypatch.setattr(s3_client, f"ARROW_{name}", value)
    with running_proxy(int(rclone_s3.env["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        forget_clients()
        yield proxy
    forget_clients()


@pytest.fixture
def proxied(proxy: Proxy, rclone_s3: S3) -> Store:
    """A store behind `proxy` that waits for it; it has a/x."""
    from dpa_ray.data.retry import bridging, retried
    from dpa_ray.store import Store
    from tests.s3_proxy import RETRY_S

    made = Store(f"{rclone_s3.uri}/store", through=retried)
    with bridging(RETRY_S):
        made.write_bytes("a/x", b"12")
    return made
