"""Are the tower's features counted right, and do pixels follow the plain formula?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpa_ray.errors import UserError
from dpa_ray.model import vlm
from dpa_ray.model.tower import image_processor, tower_spec
from dpa_ray.model.vlm import ModelRef

TOWERS = ["clip", "siglip", "dinov2"]


@pytest.mark.parametrize("kind", TOWERS)
def test_tower_spec_by_hand(kind: str, tiny_tower: Callable) -> None:
    """28 pixels, patches of 7, 4 layers; only SigLIP has no CLS."""
    spec = tower_spec(ModelRef(str(tiny_tower(kind))), -2, None)
    assert (spec.image_size, spec.num_image_tokens, spec.layer) == (28, 16, -2)
    assert (spec.has_cls, spec.select_strategy) == ((True, "default") if kind != "siglip" else (False, "full"))


@pytest.mark.parametrize("layer", [5, -6, 24])
def test_a_layer_that_the_tower_has_not_is_told(layer: int, tiny_tower: Callable) -> None:
    folder = tiny_tower("clip")
    for fine in (-5, -1, 0, 4):
        tower_spec(ModelRef(str(folder)), fine, None)
    with pytest.raises(UserError, match=rf"model.vision_layer: .* -5 to 4 \(4 layers\), found {layer}"):
        tower_spec(ModelRef(str(folder)), layer, None)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_size_that_does_not_fit_is_told(kind: str, tiny_tower: Callable) -> None:
    with pytest.raises(UserError, match="model.image_size: .* takes images of 28 pixels, found 42"):
        tower_spec(ModelRef(str(tiny_tower(kind))), -2, 42)


@pytest.mark.parametrize(("size", "num_tokens"), [(42, 36), (14, 4), (45, 36)])
def test_dinov2_takes_other_sizes(size: int, num_tokens: int, tiny_tower: Callable) -> None:
    """And gives as many features as are counted, pixels beyond whole patches left out."""
    ref = ModelRef(str(tiny_tower("dinov2")))
    spec = tower_spec(ref, -2, size)
    assert spec.num_image_tokens == num_tokens
    states = vlm.load_tower(ref, torch.float32)(torch.randn(1, 3, size, size), output_hidden_states=True).hidden_states
    assert states[-2].shape[1] - 1 == num_tokens
    with pytest.raises(UserError, match="at least one patch of 7 pixels, found 6"):
        tower_spec(ref, -2, 6)


def test_what_is_no_tower_is_told(llm_folder: Callable, tiny_tower: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a CLIP, SigLIP or DINOv2 tower, found model type llama"):
        tower_spec(ModelRef(str(llm_folder("llama"))), -2, None)
    with pytest.raises(UserError, match="no readable config.json"):
        tower_spec(ModelRef(str(tmp_path)), -2, None)
    shutil.copy(tiny_tower("clip") / "config.json", tmp_path)
    with pytest.raises(UserError, match="no readable preprocessor_config.json"):
        tower_spec(ModelRef(str(tmp_path)), -2, None)


def normalised(picture: Any, mean: list[float], std: list[float]) -> Tensor:
    import numpy as np

    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float64) / 255)
    normal: Tensor = ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    return normal


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_pixels_are_those_of_the_plain_formula(
    aspect: str, kind: str, tiny_tower: Callable, pictures: list[Any]
) -> None:
    """PIL alone: transparency on white; to a square with the mean colour, or the shorter edge to the size and the centre of the longer one, or
    both edges to the size; bicubic as in the tower's processor. 1e-5 on values of about 1: theirs is float32."""
    from PIL import Image

    ref = ModelRef(str(tiny_tower(kind)))
    processor = image_processor(ref, tower_spec(ref, -2, None), aspect)
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "siglip" else ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    for picture in pictures:
        white = Image.new("RGBA", picture.size, "white")
        plain = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        width, height = plain.size
        if aspect == "pad":
            side = max(plain.size)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
            square.paste(plain, ((side - width) // 2, (side - height) // 2))
            shown = square.resize((28, 28), Image.Resampling.BICUBIC)
        elif aspect == "stretch":
            shown = plain.resize((28, 28), Image.Resampling.BICUBIC)
        else:
            short = min(plain.size)
            larger = plain.resize((28 * width // short, 28 * height // short), Image.Resampling.BICUBIC)
            left, top = (larger.width - 28) // 2, (larger.height - 28) // 2
            shown = larger.crop((left, top, left + 28, top + 28))
        found = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found.double(), normalised(shown, mean, std), rtol=0, atol=1e-5)


def test_an_unknown_aspect_is_refused(tiny_tower: Callable) -> None:
    ref = ModelRef(str(tiny_tower("clip")))
    with pytest.raises(ValueError, match="expected image_aspect crop, pad or stretch, found tile"):
        image_processor(ref, tower_spec(ref, -2, None), "tile")
