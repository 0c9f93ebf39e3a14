"""The models of a run: a tower and an LLM put together as transformers' LLaVA, saved and exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from dpa_ray.errors import UserError
from dpa_ray.model.image_row import ImageRow
from dpa_ray.model.tower import TowerSpec

CONNECTOR_FILE = "connector.safetensors"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Settings of generation that mean nothing but where it samples, and their defaults."""
CONNECTOR_KEYS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")


@dataclass(frozen=True)
class ModelRef:
    """Where weights come from: a folder, or a hub id with the commit that it stands at."""

    location: str
    revision: str | None = None
    folder: str | None = None  # of a hub id: where its files are on this machine, so that the hub is not asked

    def kwargs(self) -> dict[str, Any]:
        # code that comes with a model is never run; without a word on it, transformers asks whoever is at the terminal
        return {
            "pretrained_model_name_or_path": self.folder or self.location, "revision": self.revision or "main",
            "trust_remote_code": False,
        }  # fmt: skip


def load_llm_config(ref: ModelRef) -> Any:
    """Raises: UserError where the folder or hub id has no causal LLM that transformers knows."""
    try:
        config = AutoConfig.from_pretrained(**ref.kwargs())
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"model.llm {ref.location}: no readable config.json: {_first_line(err)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model.llm {ref.location}: expected a decoder LLM, found model type {config.model_type}")
    if any(kind not in ("full_attention", "sliding_attention") for kind in getattr(config, "layer_types", None) or ()):
        found = sorted(set(config.layer_types))
        raise UserError(f"model.llm {ref.location}: expected full or sliding attention layers, found {found}")
    return config


def load_llm(ref: ModelRef, dtype: torch.dtype | str, attention: str = "auto") -> Any:
    """A causal LLM with its weights in `dtype`, on the CPU. Attention `auto` is transformers' own choice for the type.

    Raises: UserError where the LLM has no such attention implementation.
    """
    implementation = None if attention == "auto" else attention
    with quiet_loading():
        try:
            llm = AutoModelForCausalLM.from_pretrained(**ref.kwargs(), dtype=dtype, attn_implementation=implementation)
            return _mended_generation(llm, ref)
        except (ImportError, ValueError) as err:
            if implementation is None:
                raise
            raise UserError(
                f"model.attention {attention} is not to be had for {ref.location}: {_first_line(err)}"
            ) from None


def _mended_generation(llm: Any, ref: ModelRef) -> Any:
    """The same LLM with a generation config that can be saved: transformers reads what it refuses to write.

    Raises: UserError where it could not be written at the end of training either.
    """
    generation = llm.generation_config
    if generation is None:
        return llm
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        generation.pad_token_id = None
    given = {name: getattr(generation, name) for name in SAMPLING}
    if not generation.do_sample and any(value not in (None, SAMPLING[name]) for name, value in given.items()):
        if all(value is None or value > 0 for value in given.values()):
            generation.do_sample = True  # which is what settings for sampling are for (Vicuna's, say)
        else:  # a temperature of 0 is another way to ask for the likeliest
            for name, default in SAMPLING.items():
                setattr(generation, name, default)
    try:
        generation.validate(strict=True)
    except ValueError as err:
        raise UserError(
            f"model.llm {ref.location}: expected a generation_config.json that transformers can write again, found one "
            f"that it refuses: {' '.join(str(err).split())}"
        ) from None
    return llm


def load_tower(ref: ModelRef, dtype: torch.dtype | str) -> Any:
    """A vision tower (of a CLIP or SigLIP model: its vision half) with its weights in `dtype`, on the CPU."""
    config = AutoConfig.from_pretrained(**ref.kwargs())
    config = getattr(config, "vision_config", config)
    model_class = AutoModel._model_mapping[type(config)]
    with quiet_loading():
        return model_class.from_pretrained(**ref.kwargs(), config=config, dtype=dtype)


def append_image_row(llm: Any, row: ImageRow) -> None:
    """Give `llm` the rows that `<image>` needs beyond its own, if any: the mean of the others, as input and in the head."""
    num_new = len(row.appended_ids)
    if num_new == 0:
        return
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    tied = head.weight is embedding.weight
    _append_mean_rows(embedding, num_new)
    embedding.num_embeddings += num_new
    if tied:
        head.weight = embedding.weight
    else:
        _append_mean_rows(head, num_new)
    head.out_features = head.weight.shape[0]
    llm.config.vocab_size = embedding.num_embeddings


def _append_mean_rows(module: Any, num_new: int) -> None:
    weight = module.weight.data
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    module.weight = nn.Parameter(
        torch.cat([weight, mean.expand(num_new, -1)]), requires_grad=module.weight.requires_grad
    )


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def check_head(llm: Any) -> None:
    """Raises: UserError where the LLM's logits are more than `head(hidden)` and soft-capping: LLaVA has only those."""
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(f"model.llm: expected a head that is one matrix without bias, found {head}")
    ids = torch.arange(4).unsqueeze(0) % head.out_features
    with torch.no_grad(), _eager(llm.config):  # it is on the CPU still, where not every kernel runs
        was_training = llm.training
        llm.eval()
        hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours, theirs = head(hidden).float(), llm(input_ids=ids, use_cache=False).logits.float()
        llm.train(was_training)
    cap = softcap_of(llm.config)
    ours = ours if cap is None else cap * torch.tanh(ours / cap)
    scale = theirs.abs().max().clamp(min=1e-6)
    if not torch.allclose(ours / scale, theirs / scale, atol=1e-2):
        raise UserError(
            f"model.llm of type {llm.config.model_type}: its logits are not its head's output "
            f"(largest difference {float((ours - theirs).abs().max()):.3g}); LlavaForConditionalGeneration cannot hold it"
        )


def softcap_of(config: Any) -> float | None:
    """Final logit soft-capping of an LLM's config (Gemma-2), or None."""
    return getattr(config, "final_logit_softcapping", None)


def llava_config(llm_config: Any, tower: TowerSpec, row: ImageRow) -> LlavaConfig:
    """The config of the model put together; `llm_config` already counts an appended row."""
    tied = bool(getattr(llm_config, "tie_word_embeddings", False))
    config = LlavaConfig(
        vision_config=tower.config, text_config=llm_config, image_token_index=row.token_id,
        image_seq_length=tower.num_image_tokens, projector_hidden_act="gelu",
        vision_feature_layer=tower.layer, vision_feature_select_strategy=tower.select_strategy,
        tie_word_embeddings=tied,
    )  # fmt: skip
    config.tie_word_embeddings = tied
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(llm_config, name, None))
    return config


def assemble(llm: Any, vision_tower: Any, tower: TowerSpec, row: ImageRow, *, dtype: torch.dtype, seed: int) -> Any:
    """LlavaForConditionalGeneration around `llm` and `vision_tower`, without copying either; the connector from `seed`.

    `llm` already has its image row (`append_image_row`). The connector is a two-layer MLP with GELU (LLaVA-1.5).
    """
    attention = llm.config._attn_implementation
    config = llava_config(llm.config, tower, row)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    llm.config._attn_implementation = attention  # LLaVA has given the LLM, whose config it takes over, its own default
    model.model.language_model = llm.base_model
    model.model.vision_tower = vision_tower
    model.lm_head = llm.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = model.model.multi_modal_projector.to_empty(device="cpu").float()
        connector.linear_1.reset_parameters()
        connector.linear_2.reset_parameters()
    connector.to(dtype)
    generation = llm.generation_config
    if generation is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), row.token_id, *row.appended_ids})
        model.generation_config = generation
    on_meta = [name for name, tensor in state_tensors(model) if tensor.is_meta]
    assert not on_meta, f"still without storage: {on_meta}"
    return model


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def connector_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The connector's tensors by CONNECTOR_KEYS, picked from full tensors by any longer names."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "multi_modal_projector." in name:
            found[name.rpartition("multi_modal_projector.")[2]] = tensor.detach().cpu().contiguous()
    assert sorted(found) == sorted(CONNECTOR_KEYS), sorted(found)
    return found


def save_connector(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `connector.safetensors` from full tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(connector_state(tensors), folder / CONNECTOR_FILE, {"format": "pt"})


def load_connector(model: Any, file: Path) -> None:
    """Put a connector's weights into `model`. Raises: UserError naming the tensor that is absent or of another shape."""
    tensors = load_file(file)
    own = dict(model.model.multi_modal_projector.named_parameters())
    for name, parameter in own.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(parameter.shape):
            raise UserError(f"{file}: expected {name} of shape {tuple(parameter.shape)}, found {found or 'none'}")
        with torch.no_grad():
            parameter.copy_(tensors[name])


def import_connector(source: Path) -> dict[str, Tensor]:
    """A connector's tensors from `connector.safetensors` (or a folder with one) or LLaVA's `mm_projector.bin`.

    The .bin is read with weights_only. Raises: UserError naming what was expected and found.
    """
    file = source / CONNECTOR_FILE if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{file}: expected {CONNECTOR_FILE} or an mm_projector.bin, found no such file")
    try:
        tensors = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as err:  # pickle, zip and safetensors errors have no common type
        raise UserError(f"{file}: not readable as a connector: {_first_line(err)}") from None
    names = {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    }
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: expected tensors by name, found a {type(tensors).__name__}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(name.split(".")[-2:])
        found[names.get(short, short)] = tensor
    missing = [key for key in CONNECTOR_KEYS if not isinstance(found.get(key), Tensor)]
    if missing:
        raise UserError(
            f"{file}: expected the tensors {', '.join(CONNECTOR_KEYS)} (or LLaVA's), found {sorted(tensors)}"
        )
    bad = [key for key in CONNECTOR_KEYS if not torch.isfinite(found[key]).all()]
    if bad:
        raise UserError(f"{file}: {len(bad)} tensors are not finite, the first is {bad[0]}")
    return {key: found[key].float().contiguous() for key in CONNECTOR_KEYS}


def disable_dropout(module: nn.Module) -> None:
    """Make dropout a no-op in a frozen module, whatever its mode (train mode alone turns checkpointing on)."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


class quiet_loading:
    """transformers' loading bars and reports, which would drown a run's own lines, off for a while."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())
