"""The proxy's LoRA: attach to a causal LLM, save as a PEFT adapter folder, read one, merge it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpa_ray.errors import UserError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def linear_names(llm: Any) -> list[str]:
    """Leaf names of all linear layers of the decoder (the head is not in it), sorted."""
    return sorted(
        {n.rpartition(".")[2] for n, m in llm.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    )


def attach(llm: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """Put a LoRA on every linear layer of `llm` but its head, initialised from `seed`; all else is frozen.

    Returns: the PeftModel around `llm`, whose layers were replaced in place.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear_names(llm), bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Without autocast the adapter keeps the model's dtype, which ZeRO-3 needs; its fp32 master is the optimizer's.
        return get_peft_model(llm, config, autocast_adapter_dtype=False)


def adapter_state(peft_model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT names them, from full tensors by the peft model's own parameter names."""
    # Embeddings are never adapted; "auto" would ask the hub whether they were.
    state = get_peft_model_state_dict(peft_model, tensors, save_embedding_layers=False)
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def save_adapter(peft_model: Any, tensors: dict[str, Tensor], folder: Path, *, base_name: str) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(adapter_state(peft_model, tensors), folder / "adapter_model.safetensors", {"format": "pt"})


def check_adapter(folder: Path) -> None:
    """Raises: UserError where `folder` is no LoRA adapter in safetensors, or holds NaN."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: expected a PEFT adapter folder with {' and '.join(ADAPTER_FILES)}, found no {name}"
            )
    try:
        kind = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as err:  # safetensors and json raise types of their own
        raise UserError(f"{folder}: not readable as a PEFT adapter: {err}") from None
    if kind != "LORA":
        raise UserError(f"{folder}/adapter_config.json: expected peft_type LORA, found {kind}")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{folder}/adapter_model.safetensors: {len(bad)} tensors are not finite, the first is {bad[0]}")


def merge(llm: Any, adapter: Path) -> Any:
    """`llm` with the adapter added to its weights (in the weights' own dtype); a plain causal LLM again."""
    check_adapter(adapter)
    try:
        merged = PeftModel.from_pretrained(llm, str(adapter), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as err:
        first = str(err).strip().splitlines()
        raise UserError(
            f"{adapter}: this adapter does not fit the LLM {llm.config._name_or_path}: {first[0]}"
        ) from None
    return merged.merge_and_unload()
