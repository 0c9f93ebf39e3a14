"""The finished model as transformers loads it: weights, processor, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.errors import UserError
from dpa_ray.model.tower import TowerSpec
from dpa_ray.model.vlm import quiet_loading

FLATTEN_CONTENT = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set part = namespace(text='') -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{%- set part.text = part.text + '" + IMAGE_TOKEN + "\n' -%}"
    "{%- elif item['type'] == 'text' -%}{%- set part.text = part.text + item['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=part.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
"""Puts the lists of image and text parts that transformers' processors pass into strings, which LLM templates expect."""


def processor_for(tokenizer: Any, image_processor: Any, tower: TowerSpec) -> LlavaProcessor:
    """A LlavaProcessor whose image-token count is the tower's, with the LLM's own chat template, images allowed."""
    template = tokenizer.chat_template
    if template is not None:
        template = FLATTEN_CONTENT + template
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=tower.config.patch_size,
        vision_feature_select_strategy=tower.select_strategy, chat_template=template, image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(tower.has_cls),
    )  # fmt: skip


NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose tensors have `vision_model.` in their names in every published LLaVA model."""


def _as_published(tensors: dict[str, Tensor], tower_type: str) -> dict[str, Tensor]:
    """Names as vLLM and transformers before 5.6 know them: later ones write them without `vision_model.`, and read both."""
    if tower_type not in NESTED_TOWERS:
        return tensors
    prefix = "model.vision_tower."
    return {name.replace(prefix, f"{prefix}vision_model.", 1): tensor for name, tensor in tensors.items()}


def export(model: Any, tensors: dict[str, Tensor], processor: LlavaProcessor, folder: Path, dtype: torch.dtype) -> None:
    """Write `folder` from full tensors by the names of LlavaForConditionalGeneration's state dict.

    Tensors keep the dtype that they come in (a frozen module's is its source's); `dtype` is what the model loads as.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = dtype
    with quiet_loading():
        model.save_pretrained(folder, state_dict=_as_published(tensors, model.config.vision_config.model_type))
    model.config.dtype = dtype  # saving has put the first parameter's there, a frozen tower's
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_exported(folder: Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """(model, processor) as any user of transformers loads them."""
    with quiet_loading():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def check_same_logits(expected: Tensor, found: Tensor) -> float:
    """Largest difference of two logit tensors. Raises: UserError where the loaded model is not the trained one."""
    difference = float((expected.float() - found.float()).abs().max())
    # Same weights and dtype, another batch shape and kernel: rounding of the dtype, on the scale of the logits.
    scale = max(float(expected.float().abs().max()), 1.0)
    tolerance = (1e-4 if expected.dtype == torch.float32 else 5e-2) * scale
    if not difference <= tolerance:
        raise UserError(
            f"the exported model does not give the trained model's logits: largest difference {difference:.3g}, "
            f"expected at most {tolerance:.3g}"
        )
    return difference
