"""What does `data.skip_ids` mean to the stages: which samples each passes over, and what of that is in its key?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dpa_ray.data import skip
from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.prepare import find_prepared, prepare
from dpa_ray.data.retry import bridging
from dpa_ray.data.skip import Skipped
from dpa_ray.recipe import TRAINED_ON, Recipe, RecipeError, SourceSection
from dpa_ray.stages.keys import Skipped as InKey
from dpa_ray.store.fs import Store


def find(
    recipe: Recipe,
    store: Store,
    data: Mapping[str, tuple[SourceSection, str]],
    *,
    make: bool,
    report: Callable[[str], None],
) -> dict[str, tuple[Skipped, ...]]:
    """The samples that `data.skip_ids` means, by set; {} where there are none, or (not `make`) data is not prepared.

    The data is prepared for it, as the keys of the stages hang on what is found. `data`: section and digest of each set.
    Raises: RecipeError with every entry that means no sample; UserError where data cannot be prepared or read.
    """
    if not recipe.data.skip_ids:
        return {}
    sets = {}
    for name in TRAINED_ON:
        section, digest = data[name]
        with bridging(recipe.data.retry_s):
            prepared = find_prepared(BridgedStore(store), digest)
        if prepared is None and make:
            report(f"preparing data.{name}, for data.skip_ids: {section.label}")
            prepared = prepare(
                store, section, max_quarantined_fraction=recipe.data.max_quarantined_fraction, report=report,
                retry_s=recipe.data.retry_s,
            )  # fmt: skip
        if prepared is None:
            return {}
        sets[f"data.{name}"] = prepared
    with bridging(recipe.data.retry_s):
        found = skip.find(store, sets, recipe.data.skip_ids)
    if found.errors:
        raise RecipeError(found.errors, recipe.name)
    return {name.removeprefix("data."): rows for name, rows in found.skipped.items()}


def in_key(recipe: Recipe, found: Mapping[str, tuple[Skipped, ...]], name: str) -> InKey:
    """What is in the keys of the stages that read the set `name`: its rows, however the recipe names them. Where nothing
    was found, since data is not prepared, the recipe's entries: of a plan that is only shown."""
    if recipe.data.skip_ids and not found:
        return sorted(set(recipe.data.skip_ids))
    return [skipped.row for skipped in found.get(name, ())]
