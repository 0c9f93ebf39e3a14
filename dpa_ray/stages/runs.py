"""runs/<name>/run.json: what a run is, how far it is, and what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe, RecipeError
from dpa_ray.stages.keys import NOT_IN_KEYS
from dpa_ray.store.fs import Store

RUN_FILE = "run.json"

HOW_ONLY = ("name", "store", "cluster", "engine", "deepspeed", "checkpoint", "trackers", "debug")
"""Sections that say how a run is done, not what it is: the same name may go on with others."""

DATA_HOW_ONLY = ("prefetch_batches", "workers", "retry_s", "stall_timeout_s", "check_supervision")
"""The same of `data`."""


def identity(recipe: Recipe) -> str:
    """12 hex digits of what a run is; equal for recipes that differ only in how it is done."""
    content = {k: v for k, v in recipe.to_dict().items() if k not in HOW_ONLY}
    content["model"] = {k: v for k, v in content["model"].items() if k != "attention"}
    content["cmo"] = {k: v for k, v in content["cmo"].items() if k != "blind"}
    content["data"] = {k: v for k, v in content["data"].items() if k not in DATA_HOW_ONLY}
    content["stages"] = {
        name: {k: v for k, v in section.items() if k in ("weights", "from") or k not in NOT_IN_KEYS}
        for name, section in content["stages"].items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class Run:
    """One run's record in the store."""

    def __init__(self, store: Store, recipe: Recipe):
        self.store = store
        self.recipe = recipe
        self.path = f"runs/{recipe.name}"
        self.started = time.time()
        self.values: dict[str, Any] = {}

    def check_name(self) -> None:
        """Raises: RecipeError where the name is taken by a run of another recipe."""
        path = f"{self.path}/{RUN_FILE}"
        if not self.store.exists(path):
            return
        try:
            values = self.store.read_json(path)
            found, status = values["recipe_digest"], values["status"]
        except (UserError, KeyError, TypeError):
            raise UserError(f"{self.store.url(path)}: expected a run.json of dpa_ray, found something else") from None
        expected = identity(self.recipe)
        if status == "failed" and not self.store.exists(f"{self.path}/metrics.jsonl"):
            return  # it never trained: a mended recipe may have its name
        if found != expected:
            raise RecipeError(
                [("name", f"the run {self.recipe.name} exists in this store with another recipe: its digest is {found}, "
                          f"this recipe's is {expected}. Choose another --name, or delete {self.store.url(self.path)}")],
                self.recipe.name,
            )  # fmt: skip

    def write(self, status: str, **values: Any) -> None:
        """Set `status` and further keys, and write the whole."""
        self.values |= values
        self.store.write_json(
            f"{self.path}/{RUN_FILE}",
            {
                "name": self.recipe.name, "status": status, "method": self.recipe.method,
                "recipe_digest": identity(self.recipe), "started": self.started, "wall_time_s": time.time() - self.started,
                **self.values, "recipe": self.recipe.to_dict(),
            },
        )  # fmt: skip


def settle(store: Store, path: str, status: str, error: str) -> None:
    """Say in run.json what became of a run whose process could not, as it was ended."""
    place = f"{path}/{RUN_FILE}"
    if not store.exists(place):
        return
    values = store.read_json(place)
    if values.get("status") != "done":
        store.write_json(place, {**values, "status": status, "error": error})
