"""runs/<name>/run.json: what a run is, how far it is, and what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from dpa_ray.errors import BrokenJson, UserError
from dpa_ray.recipe import Recipe, RecipeError, parse
from dpa_ray.stages.keys import NOT_IN_KEYS
from dpa_ray.store.fs import Store

RUN_FILE = "run.json"

HOW_ONLY = ("name", "store", "cluster", "engine", "deepspeed", "checkpoint", "trackers", "debug")
"""Sections that say how a run is done, not what it is: the same name may go on with others."""

DATA_HOW_ONLY = ("prefetch_batches", "workers", "retry_s", "stall_timeout_s", "check_supervision", "eval_captions")
"""The same of `data`."""

EVAL_HOW_ONLY = ("every_steps", "running_samples")
"""The same of `eval`: looking at a stage while it runs changes nothing of it."""


def identity(recipe: Recipe) -> str:
    """12 hex digits of what a run is; equal for recipes that differ only in how it is done."""
    content = {k: v for k, v in recipe.to_dict().items() if k not in HOW_ONLY}
    content["model"] = {k: v for k, v in content["model"].items() if k not in ("attention", "compile")}
    content["cmo"] = {k: v for k, v in content["cmo"].items() if k != "blind"}
    content["data"] = {k: v for k, v in content["data"].items() if k not in DATA_HOW_ONLY}
    content["eval"] = {k: v for k, v in content["eval"].items() if k not in EVAL_HOW_ONLY}
    if not content["data"]["skip_ids"]:
        del content["data"]["skip_ids"]
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
        # asks the store that it is given; raises where another process may have taken the run over
        self.confirm: Callable[[Store], None] = lambda store: None
        self.started = time.time()
        self.values: dict[str, Any] = {}
        self.goodput: Callable[[], dict[str, Any]] = self.earlier_goodput  # asked whenever run.json is written
        self.commits: dict[str, str] = {}  # of models from the hub, by name: a run that goes on keeps to them
        self.warnings: list[dict[str, Any]] = []  # of training that may be going wrong; an earlier attempt's at first

    def check_name(self) -> None:
        """Raises: RecipeError where the name is taken by a run of another recipe."""
        path = f"{self.path}/{RUN_FILE}"
        if not self.store.exists(path):
            return
        try:
            values = self.store.read_json(path)
            found, status = values["recipe_digest"], values["status"]
            self.warnings = [dict(warned) for warned in values.get("warnings", [])]
        except (BrokenJson, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.store.url(path)}: expected a run.json of dpa_ray, found something else; delete it, or choose another --name"
            ) from None
        expected = identity(self.recipe)
        if found == expected or self._skips_others(values):
            self.commits = dict(values.get("commits") or {})
        if status in ("failed", "stopped") and not self.store.exists(f"{self.path}/metrics.jsonl"):
            return  # it never trained: a mended recipe may have its name
        if status != "done" and self._skips_others(values):
            return  # it goes on without the samples that it failed of
        if found != expected:
            raise RecipeError(
                [("name", f"the run {self.recipe.name} exists in this store with another recipe: its digest is {found}, "
                          f"this recipe's is {expected}. Choose another --name, or delete {self.store.url(self.path)}")],
                self.recipe.name,
            )  # fmt: skip

    def _skips_others(self, values: dict[str, Any]) -> bool:
        """Does this recipe differ from the one in `values`, a run.json, in `data.skip_ids` alone?"""
        try:
            before = parse(values["recipe"])
        except (RecipeError, KeyError):
            return False
        before.data.skip_ids = self.recipe.data.skip_ids
        return identity(before) == identity(self.recipe)

    def earlier_goodput(self) -> dict[str, Any]:
        """What run.json says of the time that earlier attempts spent; nothing where there was none."""
        path = f"{self.path}/{RUN_FILE}"
        values = self.store.read_json(path) if self.store.exists(path) else {}
        is_same = values.get("recipe_digest") == identity(self.recipe) or self._skips_others(values)
        found = values.get("goodput") if is_same else None
        return found if isinstance(found, dict) else {}

    def write(self, status: str, store: Store | None = None, **values: Any) -> None:
        """Set `status` and further keys, and write the whole (through `store`, where that is another one).

        Raises: LeaseTaken where another process goes on with this run: nothing is written.
        """
        store = store or self.store
        self.confirm(store)
        self.values |= values
        goodput = self.goodput()
        store.write_json(
            f"{self.path}/{RUN_FILE}",
            {
                "name": self.recipe.name, "status": status, "method": self.recipe.method,
                "recipe_digest": identity(self.recipe), "started": self.started, "wall_time_s": time.time() - self.started,
                **self.values, "commits": self.commits, "goodput": goodput, "warnings": self.warnings, "recipe": self.recipe.to_dict(),
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
