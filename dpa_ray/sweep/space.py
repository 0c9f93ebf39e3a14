"""Which recipes does a sweep try? Domains over recipe keys, as YAML data, checked as a whole before anything starts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from dpa_ray.recipe import Recipe, RecipeError, parse
from dpa_ray.recipe_errors import key_path, message, shown
from dpa_ray.recipe_sources import Section
from dpa_ray.recipe_stages import BOUNDS_ORDER
from dpa_ray.recipe_yaml import read_yaml
from dpa_ray.stages.runs import HOW_ONLY

Point = dict[str, Any]
"""Overrides of one trial: recipe key by dotted path -> value."""

Kind = Literal["grid", "choice", "uniform", "loguniform", "randint"]
LISTED: tuple[Kind, ...] = ("grid", "choice")
RANGES: tuple[Kind, ...] = ("uniform", "loguniform", "randint")

SETTINGS = "sweep"
"""The one key of a space file that is no recipe key: how to search."""

MAX_GRID = 10_000
MAX_DRAWS = 1_000
"""Draws in a row that may break lower <= upper before a space counts as empty."""
MAX_SHOWN = 20

METRICS_OF_STAGE = ("weights", "from")
"""Keys of a stage on which it hangs which metrics it tells, and whether it does."""


class AshaSection(Section):
    """Stops trials that are behind (arXiv 1810.05934), by a metric that is reported while a stage runs."""

    metric: str = Field("instruct.nll_mean", description="STAGE.KEY: one that is told while the stage runs")
    mode: Literal["min", "max"] | None = Field(None, description="default: max for accuracies, else min")
    grace_steps: int = Field(gt=0, description="no trial is stopped before this step of the metric's stage")
    reduction_factor: float = Field(3, gt=1, description="of the trials at a rung, one in so many goes on")


class SettingsSection(Section):
    """How to search. Each is an option of the command too, which then counts."""

    metric: str | None = Field(None, description="what a trial is judged by, e.g. eval.heldout.accuracy")
    mode: Literal["min", "max"] | None = Field(None, description="default: max for accuracies, else min")
    search: Literal["grid", "random", "optuna"] | None = None
    trials: int | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=2**31, description="of random and optuna")
    time_budget_s: float | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, gt=0)
    asha: AshaSection | None = None


@dataclass(frozen=True)
class Domain:
    """The values of one key: a list, or the two ends of a range."""

    kind: Kind
    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        """One value; from a list each is as likely, `loguniform` is uniform in the logarithm, `randint` has both ends."""
        if self.kind in LISTED:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(rng.integers(low, high, endpoint=True))
        if self.kind == "uniform":
            return float(rng.uniform(low, high))
        return float(min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high))


@dataclass(frozen=True)
class Space:
    """Domains by recipe key, or (of a comparison) points themselves, over a recipe."""

    recipe: dict[str, Any]  # Recipe.to_dict of the recipe that points are laid over
    domains: dict[str, Domain] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    labels: tuple[dict[str, Any], ...] = ()  # of `points`: what a comparison calls each

    def __post_init__(self) -> None:
        assert len(self.labels) in (0, len(self.points))

    def label(self, point: Point) -> dict[str, Any]:
        """What a comparison calls `point`, which is one of its own; nothing in other spaces."""
        return self.labels[self.points.index(point)] if self.labels else {}

    @property
    def is_grid(self) -> bool:
        return bool(self.points) or all(domain.kind == "grid" for domain in self.domains.values())

    def grid(self) -> Iterator[Point]:
        """Every combination, the first key slowest; also those that break the order of the bounds."""
        if self.points:
            yield from map(dict, self.points)
            return
        for values in itertools.product(*(domain.values for domain in self.domains.values())):
            yield dict(zip(self.domains, values, strict=True))

    def draw(self, rng: np.random.Generator) -> Point:
        """One point with lower <= upper. Raises: RecipeError where `MAX_DRAWS` have none."""
        for _ in range(MAX_DRAWS):
            point = {key: domain.draw(rng) for key, domain in self.domains.items()}
            if not breaks_bounds(self.recipe, point):
                return point
        raise RecipeError([("cmo", f"{BOUNDS_ORDER}, found lower > upper in each of {MAX_DRAWS} draws")], "space")


def laid_over(recipe: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Plain values of a recipe with a point's values in place. Raises: RecipeError where a key's section is none."""
    values = copy.deepcopy(dict(recipe))
    for path, value in point.items():
        *parents, last = path.split(".")
        here: Any = values
        for depth, key in enumerate(parents):
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
            if not isinstance(here, dict):
                place = ".".join(parents[: depth + 1])
                raise RecipeError([(path, f"expected {place} to be a section, found {shown(here)}")], "space")
        here[last] = copy.deepcopy(value)
    return values


def errors_of(recipe: Mapping[str, Any], point: Point) -> list[tuple[str, str]]:
    """What is wrong with the recipe at `point`."""
    try:
        parse(laid_over(recipe, point))
    except RecipeError as err:
        return err.errors
    return []


def breaks_bounds(recipe: Mapping[str, Any], point: Point) -> bool:
    """Is `point` wrong in nothing but the order of the clamp bounds?"""
    errors = errors_of(recipe, point)
    return bool(errors) and all(_is_bounds(error) for error in errors)


def _is_bounds(error: tuple[str, str]) -> bool:
    return error[0] == "cmo" and error[1].startswith(BOUNDS_ORDER)


def load_space(path: Path, recipe: Recipe) -> tuple[Space, SettingsSection]:
    """The space and the settings of a YAML file. Raises: RecipeError with every error."""
    return parse_space(read_yaml(path), recipe, str(path))


def parse_space(values: Mapping[str, Any], recipe: Recipe, where: str = "space") -> tuple[Space, SettingsSection]:
    """The same of plain values: keys by dotted path, or nested as in a recipe; a list is a grid.

    Raises: RecipeError with every error.
    """
    errors: list[tuple[str, str]] = []
    settings = SettingsSection()
    try:
        settings = SettingsSection.model_validate(values.get(SETTINGS) or {})
    except ValidationError as err:
        for error in err.errors(include_url=False):
            errors.append((f"{SETTINGS}.{key_path(error['loc'])}", message(error, SettingsSection)))
    domains: dict[str, Domain] = {}
    for key, value in values.items():
        if key != SETTINGS:
            _collect(key, value, domains, errors)
    if not domains and not errors:
        errors.append(("", "expected at least one recipe key with its values, found none"))
    for key in domains:
        if key.split(".")[0] in HOW_ONLY:
            why = "says how a run is done, not what it is: all its values give one result"
            errors.append((key, f"expected a key that changes the result, found one that {why}"))
    plain = recipe.to_dict()
    for key, domain in domains.items():
        errors += _wrong_values(plain, key, domain, errors)
    if errors:
        raise RecipeError(errors[:MAX_SHOWN], where)
    return Space(plain, domains), settings


def _collect(key: str, value: Any, domains: dict[str, Domain], errors: list[tuple[str, str]]) -> None:
    """Put what stands at `key` into `domains` or, with what is wrong, into `errors`; sections are gone into."""
    kinds = (*LISTED, *RANGES)
    if isinstance(value, list):
        value = {"grid": value}
    if not isinstance(value, dict) or not value:
        found = f"expected a list of values, or one of {', '.join(kinds)}, found {shown(value)}"
        errors.append((key, f"{found} (one fixed value goes on the command line: {key}=...)"))
        return
    named = [name for name in value if name in kinds]
    if not named:
        for name, inner in value.items():
            _collect(f"{key}.{name}", inner, domains, errors)
        return
    if len(value) > 1:
        errors.append((key, f"expected one of {', '.join(kinds)}, found {', '.join(value)} together"))
        return
    if key in domains:
        errors.append((key, "expected each key once, found it twice"))
        return
    kind, found = named[0], value[named[0]]
    problem = _wrong_list(found) if kind in LISTED else _wrong_range(kind, found)
    if problem is None:
        domains[key] = Domain(kind, tuple(found))
    else:
        errors.append((f"{key}.{kind}", problem))


def _wrong_list(found: Any) -> str | None:
    if not isinstance(found, list):
        return f"expected a list of values, found {shown(found)}"
    if not found:
        return "expected a list that is not empty, found none of its values"
    twice = [value for index, value in enumerate(found) if any(_same(value, other) for other in found[:index])]
    return f"expected each value once, found {shown(twice[0])} twice" if twice else None


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _wrong_range(kind: str, found: Any) -> str | None:
    kinds: type | tuple[type, ...] = int if kind == "randint" else (int, float)
    what = "integers" if kind == "randint" else "numbers"
    right = isinstance(found, list) and len(found) == 2
    if not right or any(isinstance(end, bool) or not isinstance(end, kinds) for end in found):
        return f"expected [low, high] of two {what}, found {shown(found)}"
    low, high = found
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return f"expected low < high, found low {low} and high {high}"
    if kind == "loguniform" and low <= 0:
        return f"expected low > 0, found {low}"
    return None


def _wrong_values(
    recipe: dict[str, Any], key: str, domain: Domain, known: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """What the recipe says of this key's values, each alone; of a range, of its ends."""
    found: list[tuple[str, str]] = []
    for value in domain.values:
        for path, text in errors_of(recipe, {key: float(value) if domain.kind in ("uniform", "loguniform") else value}):
            concerned = path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.")
            if concerned and not _is_bounds((path, text)) and (path, text) not in (*known, *found):
                found.append((path, text))
        if any(text.startswith("unknown key") for _, text in found):  # whatever its value
            break
    return found


def grid_points(space: Space) -> tuple[list[Point], list[Point]]:
    """The points of a grid, and those that were left out because lower > upper. Each point is a right recipe.

    Raises: RecipeError where a point is wrong in another way, none is left, or there are too many.
    """
    errors: dict[tuple[str, str], Point] = {}
    points: list[Point] = []
    left_out: list[Point] = []
    for point in itertools.islice(space.grid(), MAX_GRID + 1):
        found = errors_of(space.recipe, point)
        if found and all(_is_bounds(error) for error in found):
            left_out.append(point)
            continue
        for error in found:
            errors.setdefault(error, point)
        points.append(point)
    if errors:
        told = [(path, f"{text} (at {describe(point)})") for (path, text), point in errors.items()]
        raise RecipeError(told[:MAX_SHOWN], "space")
    if len(points) + len(left_out) > MAX_GRID:
        raise RecipeError([("", f"expected at most {MAX_GRID:,} combinations, found more; search at random")], "space")
    if not points:
        raise RecipeError(
            [("cmo", f"{BOUNDS_ORDER}, found lower > upper in all {len(left_out)} combinations")], "space"
        )
    return points, left_out


def metric_variants(space: Space) -> list[tuple[Point, Recipe]]:
    """The recipes of a space that may have other metrics than each other, each with what of a point makes it so."""
    if space.points:
        points = [{key: value for key, value in point.items() if _names_metrics(key)} for point in space.points]
    else:
        listed = {k: d.values for k, d in space.domains.items() if d.kind in LISTED and _names_metrics(k)}
        points = [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]
    found: list[tuple[Point, Recipe]] = []
    for number, point in enumerate(points):
        if point not in points[:number]:
            with suppress(RecipeError):  # it is told with the points, or left out
                found.append((point, parse(laid_over(space.recipe, point))))
    return found


def _names_metrics(key: str) -> bool:
    """May a recipe's value at `key` change which metrics its runs tell?"""
    section, _, last = key.rpartition(".")
    return (
        key == "method" or key.startswith(("data.", "eval.")) or (section[:7] == "stages." and last in METRICS_OF_STAGE)
    )


def describe(point: Point) -> str:
    """A point in one line, as overrides are written."""
    return " ".join(f"{key}={_short(value)}" for key, value in point.items()) or "the recipe as it is"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
