"""What the tests of whole models share: a LLaVA model put together from two small folders, and its logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa_ray.model import vlm
from dpa_ray.model.export import processor_for
from dpa_ray.model.image_row import ImageRow, add_image_token, load_tokenizer
from dpa_ray.model.tower import TowerSpec, image_processor, tower_spec
from dpa_ray.model.vlm import ModelRef


@dataclass
class Whole:
    """A LLaVA model put together from two folders, and what belongs to it."""

    model: Any
    tokenizer: Any
    row: ImageRow
    spec: TowerSpec
    processor: Any


def put_together(
    llm_folder: Path, tower_folder: Path, *, tower_dtype: Any = torch.float32, image_size: int | None = None
) -> Whole:
    """As stage 3 does it, with a fresh connector; layer -2, images padded."""
    ref, tower_ref = ModelRef(str(llm_folder)), ModelRef(str(tower_folder))
    tokenizer, row = add_image_token(load_tokenizer(ref), vlm.load_llm_config(ref).vocab_size)
    llm = vlm.load_llm(ref, torch.float32)
    spec = tower_spec(tower_ref, -2, image_size)
    vlm.append_image_row(llm, row)
    model = vlm.assemble(llm, vlm.load_tower(tower_ref, tower_dtype), spec, row, dtype=torch.float32, seed=0).eval()
    processor = processor_for(tokenizer, image_processor(tower_ref, spec, "pad"), spec)
    return Whole(model, tokenizer, row, spec, processor)


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
