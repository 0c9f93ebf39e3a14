"""Which method is ahead, by how much, and how sure is that? Variants side by side over the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from dpa_ray.recipe import RecipeError
from dpa_ray.recipe_errors import shown
from dpa_ray.recipe_stages import METHOD_WEIGHTS, Method
from dpa_ray.sweep.space import Point, Space, errors_of

BASELINE = "vanilla"
LEVEL = 0.95
FULL_PROXY = "+full-proxy"
STAGES = ("proxy_mllm", "instruct")
"""Stages that have token weights: the paper's pretraining and tuning."""


def variant(name: str) -> Point:
    """The overrides that a variant's name stands for.

    METHOD; METHOD@STAGE, with the method's token weights in that stage alone (`dpa@proxy_mllm`: the paper's "CMO in
    pretraining only"); and METHOD+full-proxy, whose proxy is trained in full instead of by LoRA.
    Raises: RecipeError for another name.
    """
    rest, _, stage = name.partition("@")
    method = rest.removesuffix(FULL_PROXY)
    methods = get_args(Method)
    if method not in methods or ("@" in name and stage not in STAGES):
        expected = f"one of {', '.join(methods)}, METHOD@{' or METHOD@'.join(STAGES)}, or METHOD{FULL_PROXY}"
        raise RecipeError([("--compare", f"expected {expected}, found {shown(name)}")], "comparison")
    point: Point = {"method": method}
    if stage:
        if METHOD_WEIGHTS[method] == "uniform":
            raise RecipeError([("--compare", f"{name}: {method} has the same weights everywhere")], "comparison")
        (other,) = set(STAGES) - {stage}
        point[f"stages.{other}.weights"] = "uniform"
    if rest.endswith(FULL_PROXY):
        point["stages.proxy_llm.llm"] = "full"
    return point


def comparison(names: Sequence[str], num_seeds: int, recipe: Mapping[str, Any]) -> Space:
    """Every variant at every seed, from the recipe's own on; a further seed adds points behind the others.

    Raises: RecipeError with every wrong name, and every variant that makes the recipe wrong: none may be left out.
    """
    errors, points = [], {}
    for name in names:
        try:
            points[name] = variant(name)
            errors += [(path, f"{text} (of {name} in --compare)") for path, text in errors_of(recipe, points[name])]
        except RecipeError as err:
            errors += err.errors
    if len(set(names)) < len(names):
        errors.append(("--compare", f"expected each name once, found {', '.join(names)}"))
    if num_seeds < 1:
        errors.append(("--seeds", f"expected a number > 0, found {num_seeds}"))
    if errors:
        raise RecipeError(errors, "comparison")
    seeds = range(recipe["seed"], recipe["seed"] + num_seeds)
    chosen = [(name, seed) for seed in seeds for name in names]
    return Space(
        dict(recipe),
        points=tuple({**points[name], "seed": seed} for name, seed in chosen),
        labels=tuple({"variant": name, "seed": seed} for name, seed in chosen),
    )


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and the interval that holds the true mean with probability 0.95."""

    num_pairs: int
    mean: float
    low: float | None  # None: one pair says nothing about how sure it is
    high: float | None

    @property
    def is_shown(self) -> bool:
        """Does the interval leave out 0?"""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    @property
    def verdict(self) -> str:
        if self.low is None:
            return "one pair only: nothing is shown"
        if not self.is_shown:
            return "no difference shown"
        return "higher" if self.mean > 0 else "lower"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """ours - theirs over the seeds that both have (Student's t for pairs); None where there is none.

    Differences that are all equal have an interval of no width.
    """
    from scipy.stats import t

    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return Difference(1, mean, None, None)
    half = float(t.ppf((1 + LEVEL) / 2, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(len(pairs), mean, mean - half, mean + half)


def compared(trials: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """`compare` of sweep.json: {baseline, level, metrics: {metric: [row]}}, variants in the trials' order.

    A row has variant, num_seeds, num_failed, values (seed -> value), mean, std (None for one seed) and, but for the
    baseline's, difference: {num_pairs, mean, low, high, verdict}. The baseline is vanilla, or else the first variant.
    """
    names = list(dict.fromkeys(trial["variant"] for trial in trials))
    baseline = BASELINE if BASELINE in names else names[0]
    tables = {}
    for metric in metrics:
        values = {name: _values(trials, name, metric) for name in names}
        tables[metric] = [_row(trials, name, values, baseline) for name in names]
    return {"baseline": baseline, "level": LEVEL, "metrics": tables}


def _values(trials: Sequence[Mapping[str, Any]], name: str, metric: str) -> dict[int, float]:
    return {
        trial["seed"]: trial["metrics"][metric]
        for trial in trials
        if trial["variant"] == name and trial["status"] == "done" and metric in trial["metrics"]
    }


def _row(
    trials: Sequence[Mapping[str, Any]], name: str, values: Mapping[str, Mapping[int, float]], baseline: str
) -> dict[str, Any]:
    own = values[name]
    row: dict[str, Any] = {
        "variant": name,
        "num_seeds": len(own),
        "num_failed": sum(trial["variant"] == name and trial["status"] == "failed" for trial in trials),
        "values": {str(seed): value for seed, value in own.items()},
        "mean": statistics.fmean(own.values()) if own else None,
        "std": statistics.stdev(own.values()) if len(own) > 1 else None,
        "difference": None,
    }
    found = None if name == baseline else paired_difference(own, values[baseline])
    if found is not None:
        row["difference"] = {
            "num_pairs": found.num_pairs, "mean": found.mean, "low": found.low, "high": found.high, "verdict": found.verdict,
        }  # fmt: skip
    return row
