"""What the stages' tests share: a recipe's keys, and what a task is made of."""

from __future__ import annotations

from typing import Any

from dpa_ray.data.prepare import Prepared
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import Recipe
from dpa_ray.stages.pipeline import make_plan
from dpa_ray.stages.spec import ArtifactRef, Weights
from dpa_ray.store.fs import Store

ORDER = ("proxy_llm", "proxy_merged", "blind", "proxy_mllm", "instruct", "eval")
"""All results of a run, in the order in which they are made."""

CONNECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
"""The connector's parameters by name."""


def keys_of(made: Recipe) -> dict[str, str]:
    """Content keys by result, without making anything."""
    plan = make_plan(made, Store(made.store), make=False, report=lambda _: None)
    return {name: ref.key for name, ref in plan.refs.items()}


def weights_of(digest: str = "1") -> Weights:
    """Source weights that nobody loads."""
    return Weights("somewhere", digest, ref=ModelRef("/somewhere"))


def common(recipe: Recipe) -> dict[str, Any]:
    """What a training task has besides the artifacts that it takes."""
    return {
        "result": ArtifactRef("instruct", "0"), "inputs": {}, "recipe": recipe, "run_path": "runs/x",
        "tower": weights_of(), "data": Prepared("d", 1, (), 0), "num_steps": 1,
    }  # fmt: skip
