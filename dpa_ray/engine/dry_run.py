"""What would a run of a recipe do? The resolved recipe and the plan, from models' configs and the store, or the recipe alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dpa_ray.credentials import without_credentials
from dpa_ray.data.prepare import find_prepared
from dpa_ray.errors import Unreachable, UserError
from dpa_ray.recipe import Recipe
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.report import console
from dpa_ray.stages import imports, weights
from dpa_ray.stages.pipeline import make_plan, num_steps
from dpa_ray.stages.preflight import trainables
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import BLIND, TRAINING_STAGES
from dpa_ray.store.fs import Store


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe and the plan; start and write nothing.

    Where the store, the data or the hub cannot be asked from here, the plan is what the recipe alone says.
    """
    store = Store(recipe.store)
    try:
        store.check(write=False)
        run = Run(store, recipe)
        run.check_name()
        plan = make_plan(recipe, store, make=False, report=lambda text: None, commits=run.commits)
    except Unreachable as err:
        console.plan(_unasked(recipe), recipe=recipe, ignored=ignored_sections(recipe))
        print(f"? is not known from here: {without_credentials(str(err))}")
        return
    notes = [f"{name} is taken at commit {commit}" for name, commit in plan.commits.items()]
    rows, notes = [], [*notes, *_look_at_imports(recipe, plan.stages)]
    with tempfile.TemporaryDirectory() as scratch:
        llm = weights.located(plan.llm, "llm", store, Path(scratch))
        tower = weights.located(plan.tower, "vision", store, Path(scratch))
        try:
            sets = trainables(recipe, llm, tower, plan.stages)
        except UserError as err:  # a built-in model is called by its name, not by where it was made to be looked at
            raise UserError(str(err).replace(f"{scratch}/", "")) from None
    counts = {stage: {s.description: s.num_parameters} for stage, s in sets.items()}
    for stage in plan.shown:
        if stage in BLIND.values():
            rows.append(console.PlanRow(stage, plan.refs[stage].key, stage in plan.found, None, is_trained=False))
            continue
        source, digest = plan.data["instruct" if stage == "instruct" else "pretrain"]
        prepared = find_prepared(store, digest)
        steps = num_steps(recipe, stage, prepared) if prepared is not None else None
        if steps is None:
            steps = getattr(recipe.stages, stage).max_steps
            notes.append(f"{stage}: {source.label} is not prepared yet; steps are shown as max_steps says, or as ?")
        rows.append(console.PlanRow(stage, plan.refs[stage].key, stage in plan.found, steps, counts[stage]))
    if recipe.data.skip_ids and not plan.skipped:
        notes.append("data.skip_ids is looked up when the data is prepared; the stages have other keys then")
    console.plan(rows, recipe=recipe, ignored=ignored_sections(recipe))
    for note in notes:
        print(note)


def _look_at_imports(recipe: Recipe, stages: tuple[str, ...]) -> list[str]:
    """What is not looked at here of `stages.X.from`. Raises: UserError where a local one is not what the stage takes."""
    notes = []
    for stage in stages:
        source: str | None = getattr(getattr(recipe.stages, stage), "from_", None)
        if source is not None and source.startswith(("s3://", "gs://")):
            notes.append(f"stages.{stage}.from: {source} is looked at by the run, which fetches it first")
        elif source is not None:
            imports.check(stage, source)
    return notes


def _unasked(recipe: Recipe) -> list[console.PlanRow]:
    """The stages of a plan without what only models, data and store could tell."""
    rows = []
    for stage in TRAINING_STAGES if recipe.method in PROXY_METHODS else TRAINING_STAGES[1:]:
        if stage in BLIND and recipe.caches_blind(stage):
            rows.append(console.PlanRow(BLIND[stage], "?", None, None, None, is_trained=False))
        rows.append(console.PlanRow(stage, "?", None, getattr(recipe.stages, stage).max_steps, None))
    return rows


def ignored_sections(recipe: Recipe) -> list[str]:
    """Sections that this recipe's method does not use, and those that nothing reads yet."""
    ignored = []
    if recipe.method not in ("dpa", "pmo"):
        ignored.append("stages.proxy_llm")
    elif recipe.stages.proxy_llm.llm != "lora":
        ignored.append("stages.proxy_llm.lora")
    if all(recipe.weights(stage) == "uniform" for stage in ("proxy_mllm", "instruct")):
        ignored.append("cmo")
    if recipe.stages.instruct.llm != "lora":
        ignored.append("stages.instruct.lora")
    if recipe.engine != "deepspeed":
        ignored.append("deepspeed")
    return ignored
