"""Which points does a sweep try, and is everything that is wrong with a space told at once?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpa_ray.recipe import Recipe, RecipeError, load, parse
from dpa_ray.sweep.search import Grid, Random
from dpa_ray.sweep.space import Domain, Space, laid_over, load_space, parse_space


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    return load("tiny")


@pytest.fixture
def space(tiny: Recipe) -> Callable[[dict[str, Any]], Space]:
    return lambda values: parse_space(values, tiny)[0]


def errors(values: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    with pytest.raises(RecipeError) as err:
        Grid(parse_space(values, recipe)[0])
    return dict(err.value.errors)


def test_a_list_is_a_grid_and_every_combination_comes_once_the_first_key_slowest(space: Callable) -> None:
    grid = Grid(space({"stages.proxy_llm.lora.rank": [4, 8], "cmo.upper": {"grid": [0.4, 0.5, 0.6]}}))
    pairs = [(p["stages.proxy_llm.lora.rank"], p["cmo.upper"]) for p in grid.points]
    assert pairs == [(4, 0.4), (4, 0.5), (4, 0.6), (8, 0.4), (8, 0.5), (8, 0.6)]
    assert grid.left_out == []


def test_keys_may_be_nested_as_in_a_recipe(space: Callable) -> None:
    nested = space({"stages": {"proxy_llm": {"lora": {"rank": [4, 8]}}}, "cmo": {"lower": {"uniform": [0, 0.1]}}})
    assert nested.domains == {
        "stages.proxy_llm.lora.rank": Domain("grid", (4, 8)), "cmo.lower": Domain("uniform", (0, 0.1)),
    }  # fmt: skip


def test_combinations_with_lower_above_upper_are_left_out_of_a_grid(space: Callable) -> None:
    grid = Grid(space({"cmo.lower": [0.1, 0.5], "cmo.upper": [0.3, 0.5]}))
    assert [(p["cmo.lower"], p["cmo.upper"]) for p in grid.points] == [(0.1, 0.3), (0.1, 0.5), (0.5, 0.5)]
    assert grid.left_out == [{"cmo.lower": 0.5, "cmo.upper": 0.3}]


def test_the_recipes_own_bound_counts_where_the_space_has_one_only(space: Callable) -> None:
    grid = Grid(space({"cmo.lower": [0.1, 0.6]}))  # upper is the method's own, 0.5
    assert grid.left_out == [{"cmo.lower": 0.6}]


def test_draws_keep_lower_below_upper_and_follow_from_seed_and_number(space: Callable) -> None:
    drawn = space({"cmo.lower": {"uniform": [0.0, 0.9]}, "cmo.upper": {"uniform": [0.1, 1.0]}})
    points = [Random(drawn, 50, seed=1).propose(n, []) for n in range(50)]
    assert all(p["cmo.lower"] <= p["cmo.upper"] for p in points)
    assert points == [Random(drawn, 50, seed=1).propose(n, []) for n in range(50)]
    assert points[0] != Random(drawn, 50, seed=2).propose(0, [])
    assert len({p["cmo.lower"] for p in points}) == 50


def test_domains_draw_what_they_say() -> None:
    rng = np.random.default_rng(0)
    assert {Domain("randint", (2, 4)).draw(rng) for _ in range(100)} == {2, 3, 4}, "both ends"
    assert {Domain("choice", ("a", None)).draw(rng) for _ in range(50)} == {"a", None}
    uniform = [Domain("uniform", (1, 3)).draw(rng) for _ in range(2000)]
    assert 1 <= min(uniform) < max(uniform) <= 3
    assert np.mean(uniform) == pytest.approx(2.0, abs=0.1)  # standard error 0.013
    logs = [math.log10(Domain("loguniform", (1e-6, 1e-2)).draw(rng)) for _ in range(2000)]
    assert -6 <= min(logs) < max(logs) <= -2
    assert np.mean(logs) == pytest.approx(-4.0, abs=0.2)  # standard error 0.026


def test_a_point_is_laid_over_the_recipe_and_changes_nothing_else(tiny: Recipe) -> None:
    plain = tiny.to_dict()
    made = parse(laid_over(plain, {"cmo.upper": 0.7, "stages.instruct.betas": [0.8, 0.9]}))
    assert (made.cmo.upper, made.stages.instruct.betas) == (0.7, (0.8, 0.9))
    assert plain == tiny.to_dict()
    assert parse(laid_over(made.to_dict(), {"cmo.upper": None, "stages.instruct.betas": [0.9, 0.98]})) == tiny


def test_every_error_of_a_space_is_told_at_once(tiny: Recipe) -> None:
    found = errors(
        {
            "stages.proxy_llm.lora.rnk": [1], "stages.proxy_mllm.lr": [], "seed": [0, "x"], "method": "dpa",
            "cmo.upper": {"uniform": [0.5, 0.1]}, "cmo.lower": {"loguniform": [0, 1]}, "cmo.window": {"randint": [1, 2.5]},
            "cluster.workers": [1, 2], "precision": {"choice": ["bf16"], "grid": ["fp32"]},
            "model.attention": ["sdpa", "sdpa"], "sweep": {"metrc": "x", "asha": {"grace_steps": 0}},
        },
        tiny,
    )  # fmt: skip
    expected = {
        "stages.proxy_llm.lora.rnk": "did you mean rank?",
        "stages.proxy_mllm.lr.grid": "not empty",
        "seed": "expected an integer, found string 'x'",
        "method": "expected a list of values",
        "cmo.upper.uniform": "low 0.5 and high 0.1",
        "cmo.lower.loguniform": "expected low > 0",
        "cmo.window.randint": "two integers",
        "cluster.workers": "says how a run is done",
        "precision": "together",
        "model.attention.grid": "twice",
        "sweep.metrc": "did you mean metric?",
        "sweep.asha.grace_steps": "> 0",
    }
    assert {key: text in found.get(key, "") for key, text in expected.items()} == dict.fromkeys(expected, True), found


def test_lower_above_upper_everywhere_is_an_error(tiny: Recipe) -> None:
    assert "in all 4 combinations" in errors({"cmo.lower": [0.6, 0.7], "cmo.upper": [0.4, 0.5]}, tiny)["cmo"]
    drawn = parse_space({"cmo.lower": {"uniform": [0.6, 0.7]}, "cmo.upper": {"uniform": [0.4, 0.5]}}, tiny)[0]
    with pytest.raises(RecipeError, match="draws"):
        Random(drawn, 3)


def test_a_combination_that_is_wrong_in_another_way_is_told_with_its_point(tiny: Recipe) -> None:
    found = errors({"method": ["dpa", "vanilla"], "cmo.blind": ["auto", "cached"]}, tiny)
    assert "(at method=vanilla cmo.blind=cached)" in found["cmo.blind"]


def test_grid_search_takes_lists_only(tiny: Recipe) -> None:
    assert "found uniform; search random" in errors({"cmo.upper": {"uniform": [0.4, 0.5]}}, tiny)["cmo.upper"]


def test_an_empty_space_is_an_error(tiny: Recipe) -> None:
    assert "at least one recipe key" in errors({"sweep": {"seed": 1}}, tiny)[""]


def test_a_space_is_read_from_yaml_with_its_settings(tmp_path: Path, tiny: Recipe) -> None:
    (tmp_path / "s.yaml").write_text(
        "stages.instruct.lr: {loguniform: [1e-5, 1e-3]}\n"
        "sweep: {search: random, trials: 4, metric: instruct.nll_mean, asha: {grace_steps: 20}}\n"
    )
    space, settings = load_space(tmp_path / "s.yaml", tiny)
    assert space.domains == {"stages.instruct.lr": Domain("loguniform", (1e-5, 1e-3))}
    assert (settings.search, settings.trials, settings.metric) == ("random", 4, "instruct.nll_mean")
    assert settings.asha is not None
    assert (settings.asha.grace_steps, settings.asha.reduction_factor) == (20, 3)
