"""Is a connector of the user's taken as it is, refused where it does not fit, and never run as code?"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from tests.small_models import put_together


def llava_connector(width: int = 32, hidden: int = 48) -> dict[str, Tensor]:
    """The keys of LLaVA's mm_projector.bin."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {f"model.mm_projector.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llavas_projector_file_is_taken(
    dtype: torch.dtype, llm_folder: Callable, tiny_tower: Callable, tmp_path: Path
) -> None:
    """Into a model, where it computes linear, GELU, linear of these tensors."""
    made = {name: t.to(dtype) for name, t in llava_connector().items()}
    torch.save(made, tmp_path / "mm_projector.bin")
    tensors = vlm.import_connector(tmp_path / "mm_projector.bin")
    assert tuple(tensors) == vlm.CONNECTOR_KEYS
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file(tensors, tmp_path / vlm.CONNECTOR_FILE)
    model = put_together(llm_folder("llama"), tiny_tower("clip")).model
    vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    a, b, c, d = (made[f"model.mm_projector.{k}"].float() for k in ("0.weight", "0.bias", "2.weight", "2.bias"))
    expected = torch.nn.functional.gelu(x @ a.T + b) @ c.T + d
    torch.testing.assert_close(model.model.multi_modal_projector(x), expected, rtol=1e-4, atol=1e-4)
    again = vlm.import_connector(tmp_path)
    assert all(torch.equal(again[k], tensors[k]) for k in vlm.CONNECTOR_KEYS), "our own file, by its folder"


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_projector_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was-here"
    torch.save({**llava_connector(), "x": Malicious(f"touch {trace}")}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="not readable as a connector"):
        vlm.import_connector(tmp_path / "mm_projector.bin")
    assert not trace.exists()
    torch.load(tmp_path / "mm_projector.bin", weights_only=False)
    assert trace.exists(), "the file is malicious indeed"


@pytest.mark.parametrize(
    "content",
    [
        {"model.mm_projector.0.weight": torch.zeros(2, 2)},
        {},
        [torch.zeros(2)],
        torch.zeros(2),
        dict.fromkeys(llava_connector(), 1),
    ],
)
def test_a_projector_file_of_other_content_is_told(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="mm_projector.bin: "):
        vlm.import_connector(tmp_path / "mm_projector.bin")


def test_a_connector_that_is_absent_or_damaged_is_told(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(UserError, match="found no such file"):
            vlm.import_connector(source)
    (tmp_path / vlm.CONNECTOR_FILE).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not readable as a connector"):
        vlm.import_connector(tmp_path)


def test_a_connector_of_other_shape_is_told_by_tensor(
    llm_folder: Callable, tiny_tower: Callable, tmp_path: Path
) -> None:
    model = put_together(llm_folder("llama"), tiny_tower("clip")).model
    before = model.model.multi_modal_projector.linear_1.weight.detach().clone()
    torch.save(llava_connector(width=31), tmp_path / "mm_projector.bin")
    tensors = vlm.import_connector(tmp_path / "mm_projector.bin")
    save_file(tensors, tmp_path / vlm.CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"expected linear_1.weight of shape \(48, 32\), found \(48, 31\)"):
        vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)
    del tensors["linear_2.bias"], tensors["linear_1.weight"]
    save_file({**tensors, "linear_1.weight": before}, tmp_path / vlm.CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"expected linear_2.bias of shape \(48,\), found none"):
        vlm.load_connector(model, tmp_path / vlm.CONNECTOR_FILE)


def test_a_connector_with_nan_is_refused(tmp_path: Path) -> None:
    made = llava_connector()
    made["model.mm_projector.2.bias"][0] = torch.nan
    torch.save(made, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="not finite"):
        vlm.import_connector(tmp_path / "mm_projector.bin")


def test_a_saved_connector_is_picked_from_longer_names(tmp_path: Path) -> None:
    made = {f"model.multi_modal_projector.{k}": torch.randn(2, 2) for k in vlm.CONNECTOR_KEYS}
    vlm.save_connector({**made}, tmp_path)
    saved = load_file(tmp_path / vlm.CONNECTOR_FILE)
    assert {f"model.multi_modal_projector.{k}" for k in saved} == set(made)
    assert all(torch.equal(saved[k.rpartition("projector.")[2]], t) for k, t in made.items())
