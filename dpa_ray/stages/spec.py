"""The vocabulary of the stages: what they hand to each other, by type, and what a worker is told to do.

A stage takes artifacts by type: stage 3's `InstructTask` has a field for the base LLM and one for a connector, and none
that a proxy fits in (the classic error of the method is to start stage 3 from the merged proxy).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpa_ray.data.prepare import Prepared
from dpa_ray.data.skip import Skipped
from dpa_ray.errors import UserError
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe
from dpa_ray.stages import hub
from dpa_ray.store.artifacts import Artifact, fetch, find
from dpa_ray.store.fs import Store

TRAINING_STAGES = ("proxy_llm", "proxy_mllm", "instruct")
"""The stages in their order, by their names in a recipe and in metrics.jsonl."""


BLIND = {"proxy_mllm": "blind", "instruct": "blind_instruct"}
"""What q of a stage's samples is called, where it is computed beforehand."""


@dataclass(frozen=True)
class ArtifactRef:
    """An artifact by what it is: stage and content key."""

    stage: str
    key: str

    @property
    def path(self) -> str:
        return f"artifacts/{self.stage}-{self.key}"

    @property
    def lease(self) -> str:
        """What the one process holds that makes it."""
        return f"leases/{self.stage}-{self.key}"

    def fetched(self, store: Store, names: list[str] | None = None) -> Path:
        """A local folder with its files, verified. Raises: UserError where it is absent or damaged."""
        return fetch(store, self.found(store), names=names)

    def found(self, store: Store) -> Artifact:
        artifact = find(store, self.stage, self.key)
        if artifact is None:
            raise UserError(f"{store.url(self.path)}: expected a finished artifact, found no manifest.json")
        return artifact


@dataclass(frozen=True)
class ArtifactFile:
    """Gives files of an artifact by their names, each verified. Picklable."""

    store: Store
    artifact: ArtifactRef

    def __call__(self, name: str) -> Path:
        which = (self.store.uri, self.artifact)
        if (known := _FOUND.get(which)) is not None:
            with suppress(UserError):  # made anew meanwhile, perhaps
                return fetch(self.store, known, names=[name]) / name
        if len(_FOUND) >= FOUND_KEPT:
            _FOUND.clear()
        _FOUND[which] = self.artifact.found(self.store)
        return fetch(self.store, _FOUND[which], names=[name]) / name


FOUND_KEPT = 4
_FOUND: dict[tuple[str, ArtifactRef], Artifact] = {}
"""Manifests that this process has read: of an artifact with thousands of files one is long, and read for each of them."""


@dataclass(frozen=True)
class Weights:
    """Source weights: a folder or hub id, or (for a built-in model) an artifact that holds them."""

    name: str  # as the recipe says it
    digest: str  # of the weights, tokenizer and configs
    ref: ModelRef | None = None
    artifact: ArtifactRef | None = None

    def located(self, store: Store) -> ModelRef:
        """Where transformers loads it from, on this node; of a hub id, its config and tokenizer at least are there then.

        Raises: UserError where it is not to be had.
        """
        if self.artifact is not None:
            return ModelRef(str(self.artifact.fetched(store)))
        assert self.ref is not None
        if self.ref.revision is None and not Path(self.ref.location).is_dir():
            raise UserError(
                f"{self.ref.location}: expected this model folder on every node of the cluster, found none here"
            )
        return hub.here(self.ref, with_weights=False)


@dataclass(frozen=True)
class BaseLlm:
    """The LLM as the user gave it. Stages 1 and 3 start from it."""

    weights: Weights


@dataclass(frozen=True)
class ProxyAdapter:
    """Stage 1's result: a PEFT adapter."""

    artifact: ArtifactRef


@dataclass(frozen=True)
class FullProxy:
    """Stage 1's result where the proxy is trained in full: all parameters of the LLM."""

    artifact: ArtifactRef


@dataclass(frozen=True)
class MergedProxy:
    """The base LLM with stage 1's result in it; stage 2's LLM in the methods that have a proxy."""

    artifact: ArtifactRef


@dataclass(frozen=True)
class Connector:
    """Stage 2's result."""

    artifact: ArtifactRef


@dataclass(frozen=True)
class Task:
    """One unit of work for the workers, whose result is one artifact."""

    result: ArtifactRef
    inputs: dict[str, Any]  # what the result's key was made of
    recipe: Recipe
    run_path: str  # runs/<name>


@dataclass(frozen=True)
class ProxyLlmTask(Task):
    base: BaseLlm
    data: Prepared
    num_steps: int
    stage: str = "proxy_llm"
    skipped: tuple[Skipped, ...] = ()
    held_out: Prepared | None = None  # for what is told of it, and changes nothing: held-out nll, losses of words


@dataclass(frozen=True)
class MergeTask(Task):
    base: BaseLlm
    adapter: ProxyAdapter | FullProxy
    stage: str = "proxy_merged"


@dataclass(frozen=True)
class ProxyMllmTask(Task):
    llm: BaseLlm | MergedProxy
    tokenizer: BaseLlm  # whose tokenizer it is, also where the LLM is the merged proxy
    tower: Weights
    data: Prepared
    num_steps: int
    stage: str = "proxy_mllm"
    blind: ArtifactRef | None = None  # q of its samples, where it was computed beforehand
    skipped: tuple[Skipped, ...] = ()
    held_out: Prepared | None = None  # for what is told of it, and changes nothing: held-out nll, losses of words


@dataclass(frozen=True)
class InstructTask(Task):
    base: BaseLlm
    connector: Connector
    tower: Weights
    data: Prepared
    num_steps: int
    stage: str = "instruct"
    blind: ArtifactRef | None = None  # q of its samples, where its LLM is frozen and it was computed beforehand
    skipped: tuple[Skipped, ...] = ()
    held_out: Prepared | None = None  # for what is told of it, and changes nothing: held-out nll, losses of words

    def __post_init__(self) -> None:
        if not isinstance(self.base, BaseLlm) or not isinstance(self.connector, Connector):
            raise TypeError("stage 3 takes the base LLM and a connector, never a proxy")


@dataclass(frozen=True)
class BlindTask(Task):
    """q of the samples that `reader` will take, from the frozen LLM that it will be given."""

    reader: ProxyMllmTask | InstructTask
    num_image_tokens: int
    stage: str = "blind"


@dataclass(frozen=True)
class EvalTask(Task):
    base: BaseLlm  # whose rows of the vocabulary are in the softmax
    model: ArtifactRef  # an instruct artifact
    sets: dict[str, Prepared]  # held-out sets by name
    stage: str = "eval"


TrainTask = ProxyLlmTask | ProxyMllmTask | InstructTask
AnyTask = TrainTask | MergeTask | BlindTask | EvalTask


def precision_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def learning_rate(step: int, num_steps: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then half a cosine down to 0 (Loshchilov & Hutter 2017).

    Warm-up lasts ceil(warmup_fraction * num_steps) steps and, unlike transformers' schedule, its first step already
    moves: at step s it is peak * (s + 1) / warm-up steps.
    """
    warmup = math.ceil(warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
