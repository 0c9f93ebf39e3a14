"""The vision tower's side of the contract: how many image tokens, from which layer, and how images become pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa_ray.errors import UserError

if TYPE_CHECKING:
    from dpa_ray.model.vlm import ModelRef

HAS_CLS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""Tower types that are supported, and whether their first hidden state is a CLS token, which LLaVA drops."""

RESIZES_POSITIONS = ("dinov2",)
"""Tower types that take images of another size than their config's by themselves."""


@dataclass(frozen=True)
class TowerSpec:
    config: Any  # the vision config of transformers
    layer: int  # hidden state that feeds the connector
    image_size: int  # pixels a side
    num_image_tokens: int  # features per image

    @property
    def has_cls(self) -> bool:
        return bool(HAS_CLS[self.config.model_type])

    @property
    def select_strategy(self) -> str:
        return "default" if self.has_cls else "full"


def tower_spec(ref: ModelRef, layer: int, image_size: int | None) -> TowerSpec:
    """What the tower gives, checked without its weights.

    Args:
        layer: recipe's `vision_layer`; `image_size`: recipe's, or None for the image processor's.
    Raises: UserError where tower, layer and size do not fit together.
    """
    try:
        config = AutoConfig.from_pretrained(**ref.kwargs())
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"model.vision {ref.location}: no readable config.json: {str(err).splitlines()[0]}") from None
    config = getattr(config, "vision_config", config)
    if config.model_type not in HAS_CLS or type(config) not in AutoModel._model_mapping:
        raise UserError(
            f"model.vision {ref.location}: expected a CLIP, SigLIP or DINOv2 tower, found model type {config.model_type}"
        )
    num_states = config.num_hidden_layers + 1
    if not -num_states <= layer < num_states:
        raise UserError(
            f"model.vision_layer: expected a hidden state of {ref.location}, "
            f"{-num_states} to {num_states - 1} ({config.num_hidden_layers} layers), found {layer}"
        )
    size = image_size or _processor_size(_load_processor(ref), ref)
    native = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    if size != native and config.model_type not in RESIZES_POSITIONS:
        raise UserError(
            f"model.image_size: the tower {ref.location} ({config.model_type}) takes images of {native} pixels, found {size}"
        )
    if size < config.patch_size:
        raise UserError(f"model.image_size: expected at least one patch of {config.patch_size} pixels, found {size}")
    return TowerSpec(config, layer, size, (size // config.patch_size) ** 2)


def count_image_tokens(ref: ModelRef, image_size: int | None) -> int:
    """Features per image that `tower_spec` gives, for a content key: nothing is checked."""
    config = AutoConfig.from_pretrained(**ref.kwargs())
    size = image_size or _processor_size(_load_processor(ref), ref)
    return int(size // getattr(config, "vision_config", config).patch_size) ** 2


def image_processor(ref: ModelRef, spec: TowerSpec, aspect: str) -> LlavaImageProcessorPil:
    """The image processor for one `image_aspect`; the very object that a finished model is exported with.

    crop: the shorter edge to the tower's size, then the centre. pad: to a square with the mean colour first.
    stretch: both edges to the tower's size. Mean, deviation and resampling are the tower's own.
    """
    own = _load_processor(ref)
    size = spec.image_size
    common: dict[str, Any] = dict(
        do_resize=True, resample=own.resample, do_rescale=True, rescale_factor=own.rescale_factor, do_normalize=True,
        image_mean=list(own.image_mean), image_std=list(own.image_std), do_convert_rgb=True,
        crop_size={"height": size, "width": size}, do_pad=aspect == "pad", do_center_crop=aspect == "crop",
    )  # fmt: skip
    if aspect == "crop":
        return LlavaImageProcessorPil(**common, size={"shortest_edge": size})
    if aspect in ("pad", "stretch"):
        return LlavaImageProcessorPil(**common, size={"height": size, "width": size})
    raise ValueError(f"expected image_aspect crop, pad or stretch, found {aspect}")


def _load_processor(ref: ModelRef) -> Any:
    try:
        processor = AutoImageProcessor.from_pretrained(**ref.kwargs(), backend="pil")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(
            f"model.vision {ref.location}: no readable preprocessor_config.json: {str(err).splitlines()[0]}"
        ) from None
    for name in ("image_mean", "image_std", "resample", "rescale_factor"):
        if getattr(processor, name, None) is None:
            raise UserError(f"model.vision {ref.location}: its preprocessor_config.json gives no {name}")
    return processor


def _processor_size(processor: Any, ref: ModelRef) -> int:
    """Pixels a side of what the tower's own processor gives."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    for size in (crop, processor.size):
        for key in ("height", "shortest_edge"):
            value = (size or {}).get(key) if isinstance(size, dict) else getattr(size, key, None)
            if value:
                return int(value)
    raise UserError(f"model.vision {ref.location}: its preprocessor_config.json gives no image size")
