"""Which trial makes what several need? Each artifact is made once, and who makes one never waits for another.

A trial claims, just before it starts workers, the tasks that it will do with them: the leading ones of its list that
nobody has claimed. Where the first is claimed it waits, without workers and without claims of its own. So nobody who
holds anything waits for a claim, and trials cannot wait for each other in a circle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dpa_ray.recipe import Recipe
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.stages import keys
from dpa_ray.stages.spec import Task, Weights
from dpa_ray.store.artifacts import content_key

POLL_S = 0.5


class Claims:
    """Who makes which artifact now; an actor of the sweep's driver."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}  # artifact path -> trial

    def take(self, trial: str, paths: Sequence[str]) -> int:
        """Claim the leading ones of `paths` that no other trial has, in place of what `trial` had; returns how many."""
        self.release(trial)
        for number, path in enumerate(paths):
            if path in self.owners:
                return number
            self.owners[path] = trial
        return len(paths)

    def release(self, trial: str) -> None:
        """`trial` is done, or is no more."""
        self.owners = {path: owner for path, owner in self.owners.items() if owner != trial}


def claim(
    tasks: Sequence[Task],
    alone: Callable[[Sequence[Task]], int],
    *,
    take: Callable[[list[str]], int],
    check: Callable[[], None] = lambda: None,
) -> int:
    """How many of the leading tasks this trial is to do; 0 where the first is done already.

    Args:
        alone: the same of jobs outside the sweep (`engine.job.unhindered`).
        take: claims leading paths, and says how many.
        check: called while waiting; what it raises ends that.
    """
    while True:
        num_free = alone(tasks)
        if num_free == 0:
            return 0
        num_mine = take([task.result.path for task in tasks[:num_free]])
        if num_mine:
            num_left = alone(tasks[:num_mine])  # one may have been finished just before; from here on none can be
            if num_left == 0:
                take([])
            return num_left
        check()
        time.sleep(POLL_S)


def chain(recipe: Recipe) -> tuple[str, ...]:
    """Names of the artifacts that `recipe` needs, in order; equal where their content keys are.

    Without looking at any data or model: digests are stood in for by what the recipe says of data and models.
    """
    model, data = recipe.model, recipe.to_dict()["data"]
    llm, tower = Weights(model.llm, model.llm), Weights(model.vision, model.vision)
    captions, instruct = (str((data[name], data["skip_ids"])) for name in ("pretrain", "instruct"))
    inputs: list[dict[str, Any]] = []
    llm_key = model.llm
    if recipe.method in PROXY_METHODS:
        inputs.append(keys.proxy_llm_inputs(recipe, llm, captions) | {"from": recipe.stages.proxy_llm.from_})
        llm_key = content_key(inputs[-1])
    if recipe.caches_blind("proxy_mllm"):
        inputs.append(keys.blind_inputs(recipe, llm_key, 0, captions))
    inputs.append(keys.proxy_mllm_inputs(recipe, llm_key, tower, captions) | {"from": recipe.stages.proxy_mllm.from_})
    connector_key = content_key(inputs[-1])
    if recipe.caches_blind("instruct"):
        inputs.append(keys.blind_inputs(recipe, model.llm, 0, instruct, "instruct"))
    inputs.append(keys.instruct_inputs(recipe, llm, tower, connector_key, instruct))
    return tuple(content_key(each) for each in inputs)


def choose(waiting: Sequence[tuple[str, ...]], running: Sequence[tuple[str, ...]], made: Collection[str]) -> int | None:
    """Which of the `waiting` chains to start beside the `running` ones: the first that would not begin by waiting for one.

    None where each would. `made`: what is there already.
    """
    busy = {name for names in running for name in names}
    firsts = [next((name for name in names if name not in made), None) for names in waiting]
    return next((number for number, first in enumerate(firsts) if first not in busy), None)
