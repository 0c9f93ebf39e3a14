"""What is a trial judged by? Metrics by name, while it runs and at its end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from dpa_ray.eval.exact_match import ExactMatch
from dpa_ray.eval.held_out import PREFIX, TIME, HeldOutNll
from dpa_ray.recipe import HELD_OUT, Recipe, SourceSection
from dpa_ray.recipe_sources import is_mixture_file
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.stages.spec import TRAINING_STAGES

WINDOW_FRACTION = 0.1
WINDOW_STEPS = 5
"""A stage's number is the mean over its last tenth, or five steps: one batch is mostly noise."""

REPORTS = 50
"""How often a stage's numbers are told while it runs, at most: each time asks the sweep's driver whether to stop."""

SKIPPED = ("step", "epoch", "lr", "step_time_s", "data_wait_s", "saving_s", "packing_efficiency", TIME)
"""Numbers of metrics.jsonl that say how a step was made, as do those that begin with num_ or eval_num_."""

STEP_KEYS = ("loss", "nll_mean", "weight_mean", "weight_at_lower_fraction", "weight_at_upper_fraction", "grad_norm",
             "tokens_per_s")  # fmt: skip
"""What every stage tells of how good a step was, by its name in metrics.jsonl."""

VISUAL_KEYS = ("nll_mean_visual", "weight_mean_visual", "nll_mean_style", "weight_mean_style")
"""What is told too where the data knows its visual words, as builtin:shapes does."""

GAIN_KEYS = ("gain_auc",)
"""What is told there where weights need q."""

EVAL_KEYS = tuple(field.name for kind in (ExactMatch, HeldOutNll) for field in fields(kind))
"""What is told of each held-out set."""

RUNNING_KEYS = tuple(f"{PREFIX}{field.name}" for field in fields(HeldOutNll) if not field.name.startswith("num_"))
"""What is told of one while a stage runs."""


def window(num_steps: int) -> int:
    """Steps that a stage's number is the mean of."""
    return max(WINDOW_STEPS, int(WINDOW_FRACTION * num_steps))


class Running:
    """The numbers of one stage, step by step."""

    def __init__(self, stage: str, num_steps: int):
        self.stage, self.num_steps = stage, num_steps
        self.last: deque[Mapping[str, Any]] = deque(maxlen=window(num_steps))
        self.held_out: dict[str, float] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.last.append(record)
        latest = {key: value for key, value in record.items() if key.startswith(PREFIX) and _is_number(value)}
        self.held_out |= {f"{self.stage}.{key}": value for key, value in latest.items() if _judges(key)}

    def is_due(self, step: int) -> bool:
        """Is this a step after which to tell? It depends on the step alone, so that the same is told in every attempt; so
        does whether the step was evaluated, after which all is told too."""
        every = max(1, self.num_steps // REPORTS)
        return step % every == 0 or step == self.num_steps or any(key.startswith(PREFIX) for key in self.last[-1])

    def values(self) -> dict[str, float]:
        """`STAGE.KEY` -> mean over the window, of every key that tells how good it is; of a held-out one, the latest."""
        found = {key for record in self.last for key, value in record.items() if _is_number(value)}
        means = dict(self.held_out)
        for name in sorted(name for name in found if _judges(name) and not name.startswith(PREFIX)):
            numbers = [record[name] for record in self.last if _is_number(record.get(name))]
            means[f"{self.stage}.{name}"] = sum(numbers) / len(numbers)
        return means


def _judges(name: str) -> bool:
    """Does the number say how good a step was, and not how it was made?"""
    return name not in SKIPPED and not name.removeprefix(PREFIX).startswith("num_")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def final(records: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """All metrics of a finished run: its metrics.jsonl, stage by stage, and `eval` of its run.json."""
    found: dict[str, float] = {}
    for stage in TRAINING_STAGES:
        own = [record for record in records if record["stage"] == stage]
        running = Running(stage, len(own))
        for record in own:
            running.add(record)
        found |= running.values()
    return found | held_out(scores)


def held_out(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`eval.SET.KEY` of held-out scores by set."""
    return {
        f"eval.{name}.{key}": float(value)
        for name, score in scores.items()
        for key, value in score.items()
        if _is_number(value)
    }


def default_metric(recipe: Recipe) -> str:
    """Held-out accuracy where the recipe has a held-out set, else the last stage's plain loss."""
    if recipe.data.eval is not None:
        return f"eval.{HELD_OUT}.accuracy"
    if recipe.data.eval_extra:
        return f"eval.{next(iter(recipe.data.eval_extra))}.accuracy"
    return "instruct.nll_mean"


def default_mode(metric: str) -> Literal["min", "max"]:
    """Accuracies and areas under a curve are better when they are larger, losses when they are smaller."""
    return "max" if metric.rsplit(".", 1)[-1] in ("accuracy", "exact_match", "gain_auc") else "min"


def comes_while_running(metric: str) -> bool:
    """Is it known before a trial's end? (Held-out questions are answered after the last stage, but the nll of a held-out
    set comes at a stage's cadence too: STAGE.eval_nll.)"""
    return not metric.startswith("eval.")


def problem(metric: str, recipe: Recipe) -> str | None:
    """What is wrong with a metric's name, if anything."""
    where, _, key = metric.partition(".")
    if where == "eval":
        sets = [*([HELD_OUT] if recipe.data.eval is not None else []), *recipe.data.eval_extra]
        name, _, key = key.rpartition(".")
        if name in sets and key in EVAL_KEYS:
            return None
        known = (
            f"one of the held-out sets ({', '.join(sets) or 'this recipe has none'}) and one of {', '.join(EVAL_KEYS)}"
        )
        return f"expected eval.SET.KEY with {known}, found {metric}"
    if where not in TRAINING_STAGES or not key:
        return f"expected eval.SET.KEY or STAGE.KEY with one of {', '.join(TRAINING_STAGES)}, found {metric}"
    trained = _trained(recipe)
    if where not in trained:
        why = f"stages.{where}.from" if where in _imported(recipe) else f"method {recipe.method}"
        return (
            f"expected a stage that is trained ({', '.join(trained)}), found {metric}: with {why} there is no {where}"
        )
    if key.startswith(PREFIX) and key in RUNNING_KEYS and recipe.held_out(where) is None:
        needs = "data.eval" if where == "instruct" else "data.eval_captions"
        return f"expected a recipe with eval.every_steps and {needs} for {metric}, found one without"
    told = stage_keys(recipe, where)
    return None if key in told else f"expected {where}.KEY with one of {', '.join(told)}, found {metric}"


def stage_keys(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """What `stage` of a run of this recipe tells of how good it is: the keys of `Running.values`."""
    source = recipe.data.instruct if stage == "instruct" else recipe.data.pretrain
    knows_visual = _may_know_visual(source)
    has_gains = knows_visual and recipe.weights(stage) != "uniform"
    is_evaluated = recipe.held_out(stage) is not None
    return (
        *STEP_KEYS,
        *(VISUAL_KEYS if knows_visual else ()),
        *(GAIN_KEYS if has_gains else ()),
        *(RUNNING_KEYS if is_evaluated else ()),
    )


def _trained(recipe: Recipe) -> list[str]:
    """The stages that a run of this recipe trains, or finds trained by another."""
    absent = _imported(recipe) if recipe.method in PROXY_METHODS else {"proxy_llm", *_imported(recipe)}
    return [stage for stage in TRAINING_STAGES if stage not in absent]


def _imported(recipe: Recipe) -> set[str]:
    """The stages whose result the user brings: they have no steps."""
    return {stage for stage in ("proxy_llm", "proxy_mllm") if getattr(recipe.stages, stage).from_ is not None}


def _may_know_visual(section: SourceSection) -> bool:
    """May the visual words of this data be known? A mixture's file is not read here."""
    if isinstance(section.source, str):
        return section.source.startswith("builtin:") or is_mixture_file(section.source)
    return any(entry.source.startswith("builtin:") for entry in section.source)
