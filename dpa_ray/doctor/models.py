"""Do the models load, as far as configs and tokenizers tell? Weights are looked at, not read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from dpa_ray.doctor.findings import Check
from dpa_ray.errors import UserError
from dpa_ray.model.tower import TowerSpec
from dpa_ray.model.vlm import ModelRef
from dpa_ray.stages import imports, weights
from dpa_ray.store.artifacts import find
from dpa_ray.store.fs import Store

COMPLETE_FRACTION = 0.98
"""Of a model's parameters: with fewer in the files, some are missing. (What is tied is counted once or twice.)"""


def locate(name: str, kind: weights.Kind, store: Store, scratch: Path, check: Check) -> ModelRef:
    """Where config and tokenizer of `name` can be read from.

    A built-in model that nobody has made yet is made in `scratch`, untrained. Raises: UserError.
    """
    folder = Path(name).expanduser()
    if not name.startswith("builtin:") and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.{kind} {name}: expected a model folder with config.json, found none in it")
        check.note(f"{name}: a folder, which every node needs at this path")
        return ModelRef(str(folder.resolve()))
    found = weights.resolve(name, kind, store, make=False, report=lambda text: None)
    if found.artifact is None:
        assert found.ref is not None
        check.note(f"{name} at commit {found.ref.revision}; each node fetches the weights from the hub")
        return found.located(store)
    if find(store, found.artifact.stage, found.artifact.key) is not None:
        check.note(f"{name}, made before")
        return found.located(store)
    check.note(f"{name}, which the first run makes")
    return weights.located(found, kind, store, scratch)


def check_weights(ref: ModelRef, kind: weights.Kind, num_parameters: int, check: Check) -> None:
    """Are the weights of a folder all there? From file headers; `num_parameters` is what the config asks for."""
    folder = Path(ref.location)
    if not folder.is_dir():
        return
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(wanted - set(names)):
            check.fail(
                f"{index}: expected {len(wanted)} files beside it, found {len(wanted) - len(missing)}; fetch {missing[0]}"
            )
            return
        names = sorted(wanted)
    if not names:
        if not list(folder.glob("pytorch_model*.bin")):
            check.warn(
                f"model.{kind} {folder}: expected weights (*.safetensors), found none here; config and tokenizer were checked. "
                "Put the weights there before the run"
            )
        return
    count = 0
    for name in names:
        try:
            with safe_open(folder / name, "pt") as file:
                count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as err:
            check.fail(
                f"{folder / name}: expected a whole safetensors file, found one that does not open ({err}); fetch it again"
            )
            return
    if count < COMPLETE_FRACTION * num_parameters:
        check.fail(
            f"{folder}: expected {num_parameters:,} parameters, as its config.json says, found {count:,} in "
            f"{len(names)} file{'' if len(names) == 1 else 's'}; fetch the weights again, or the config that belongs to them"
        )
        return
    check.note(f"model.{kind}: {count:,} parameters in {len(names)} file{'' if len(names) == 1 else 's'}")


def num_parameters(whole: Any) -> dict[str, int]:
    """Of a LLaVA model's parts: llm (without a LoRA; a tied head is counted once), tower, connector."""
    parts = {"tower": whole.model.vision_tower, "connector": whole.model.multi_modal_projector}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    base = sum(p.numel() for name, p in whole.named_parameters() if ".lora_" not in name)
    return {**counts, "llm": base - sum(counts.values())}


def check_import(stage: str, source: str, check: Check) -> None:
    """Is what `stages.X.from` names an adapter or a connector? Raises: UserError."""
    if source.startswith(("s3://", "gs://")):
        check.skip(f"{source} is in a bucket; the run fetches it and looks at it first")
        return
    imports.check(stage, source)
    check.note(f"{source} is whole")


def num_features(spec: TowerSpec) -> int:
    """How many features the tower gives for one image: its own code, run on the meta device."""
    with torch.device("meta"), torch.no_grad():
        tower: Any = AutoModel._model_mapping[type(spec.config)](spec.config)
        pixels = torch.empty(1, 3, spec.image_size, spec.image_size)
        states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    return int(states[spec.layer].shape[1]) - int(spec.has_cls)


def head_of(model: Any) -> Any:
    """The matrix that makes logits. Raises: UserError where it is more than that."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise UserError(f"model.llm: expected a head that is one matrix without bias, found {head}")
    return head
