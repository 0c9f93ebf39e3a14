"""What each stage trains: the one place that says so, and the check that it is exactly that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONNECTOR = ".multi_modal_projector."
TOWER = ".vision_tower."
LORA = ".lora_"


@dataclass(frozen=True)
class TrainableSet:
    """The trainable parameters of a model, by name."""

    description: str
    names: tuple[str, ...]
    num_parameters: int


DESCRIPTIONS = {
    ("proxy_llm", "lora"): "LoRA of the LLM",
    ("proxy_llm", "full"): "LLM",
    ("proxy_mllm", "frozen"): "connector",
    ("instruct", "full"): "connector + LLM",
    ("instruct", "lora"): "connector + LoRA of the LLM",
    ("instruct", "frozen"): "connector",
}


def is_trained(name: str, stage: str, llm: str) -> bool:
    """Is the parameter `name` trained in `stage`, with the LLM `full`, `lora` or `frozen`? The tower never is."""
    name = f".{name}"
    if stage == "proxy_llm":
        return llm == "full" or LORA in name
    if CONNECTOR in name:
        return True
    if stage == "proxy_mllm" or llm == "frozen" or TOWER in name:
        return False
    return True if llm == "full" else LORA in name


def select_trainable(model: Any, stage: str, llm: str) -> TrainableSet:
    """Set `requires_grad` on every parameter of `model`; returns what is trained.

    Raises: RuntimeError where nothing would be.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, stage, llm))
    return current_trainable(model, stage, llm)


def current_trainable(model: Any, stage: str, llm: str) -> TrainableSet:
    """What `requires_grad` says now."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not found:
        raise RuntimeError(f"stage {stage}: nothing to train")
    count = sum(getattr(p, "ds_numel", p.numel()) for _, p in found)  # ds_numel: whole size under ZeRO-3
    return TrainableSet(DESCRIPTIONS[stage, llm], tuple(name for name, _ in found), count)


def check_trainable(model: Any, optimized: set[int], expected: TrainableSet, stage: str, llm: str) -> None:
    """Stop unless what requires a gradient, and what the optimizer was given, is exactly `expected`.

    Args:
        optimized: `id` of every parameter given to the optimizer.
    Raises: RuntimeError naming what is too much or too little.
    """
    named = list(model.named_parameters())
    wanted = {name for name, _ in named if is_trained(name, stage, llm)}
    for what, names in (
        ("with a gradient", {name for name, p in named if p.requires_grad}),
        ("in the optimizer", {name for name, p in named if id(p) in optimized}),
        ("selected at the start", set(expected.names)),
    ):
        if names != wanted:
            raise RuntimeError(
                f"stage {stage}: expected exactly {len(wanted)} trainable parameters {what}, found {len(names)}; "
                f"too much: {sorted(names - wanted)[:5]}, missing: {sorted(wanted - names)[:5]}"
            )
