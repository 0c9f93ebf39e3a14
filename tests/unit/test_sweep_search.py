"""Does Optuna find a planted optimum sooner than chance, and go on after a stop as if there had been none?"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from dpa_ray.recipe import load
from dpa_ray.sweep.search import Optuna, Random, Search, Tried
from dpa_ray.sweep.space import Space, parse_space

NUM_TRIALS = 30
NUM_SEEDS = 20


@pytest.fixture(scope="module")
def space() -> Space:
    values: dict[str, Any] = {
        "cmo.lower": {"uniform": [0.0, 0.4]},
        "cmo.upper": {"uniform": [0.1, 1.0]},
        "stages.instruct.lr": {"loguniform": [1e-5, 1e-1]},
        "stages.proxy_llm.lora.rank": [4, 8, 16],
    }
    return parse_space(values, load("tiny"))[0]


def distance(point: dict[str, Any]) -> float:
    """From the planted optimum: lower 0.05, upper 0.5, lr 1e-3, rank 8; each key's range counts as 1."""
    import math

    return (
        abs(point["cmo.lower"] - 0.05) / 0.4
        + abs(point["cmo.upper"] - 0.5) / 0.9
        + abs(math.log10(point["stages.instruct.lr"]) + 3) / 4
        + 0.5 * (point["stages.proxy_llm.lora.rank"] != 8)
    )


def search_on(search: Search, num_trials: int, tried: list[Tried] | None = None) -> list[Tried]:
    tried = list(tried or [])
    while len(tried) < num_trials:
        point = search.propose(len(tried), tried)
        tried.append(Tried(len(tried), point, distance(point)))
    return tried


def best(tried: list[Tried]) -> float:
    return min(t.value for t in tried if t.value is not None)


def test_optuna_beats_random_on_a_planted_optimum(space: Space) -> None:
    """Median of 20 seeds, 30 trials each."""
    by_optuna = [best(search_on(Optuna(space, NUM_TRIALS, seed), NUM_TRIALS)) for seed in range(NUM_SEEDS)]
    by_chance = [best(search_on(Random(space, NUM_TRIALS, seed), NUM_TRIALS)) for seed in range(NUM_SEEDS)]
    assert statistics.median(by_optuna) < statistics.median(by_chance)


def test_optuna_goes_the_right_way_for_max(space: Space) -> None:
    search = Optuna(space, 40, 0, mode="max")
    tried: list[Tried] = []
    for number in range(40):
        point = search.propose(number, tried)
        tried.append(Tried(number, point, point["cmo.upper"]))
    late = statistics.fmean(t.point["cmo.upper"] for t in tried[20:])
    assert late > 0.75, "uniform draws have a mean of 0.6 or less"


def test_optuna_keeps_lower_below_upper_and_goes_on_as_if_never_stopped(space: Space) -> None:
    whole = search_on(Optuna(space, 16, seed=3), 16)
    assert all(t.point["cmo.lower"] <= t.point["cmo.upper"] for t in whole)
    assert search_on(Optuna(space, 16, seed=3), 16, whole[:12]) == whole
    assert search_on(Optuna(space, 16, seed=4), 1) != whole[:1]


def test_optuna_takes_trials_without_a_value(space: Space) -> None:
    tried = search_on(Optuna(space, 20, seed=1), 12)
    tried += [Tried(12, tried[0].point, None)]
    assert set(Optuna(space, 20, seed=1).propose(13, tried)) == set(space.domains)
