"""Are differences between methods told with the right interval, and is nothing told where nothing is shown?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpa_ray.recipe import RecipeError, load
from dpa_ray.sweep.compare import Difference, compared, comparison, paired_difference, variant
from dpa_ray.sweep.search import Grid


def trial(variant: str, seed: int, value: float | None, status: str = "done") -> dict[str, Any]:
    metrics = {} if value is None else {"eval.heldout.accuracy": value}
    return {"variant": variant, "seed": seed, "status": status, "metrics": metrics}


def test_the_interval_is_the_one_of_a_textbook() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445."""
    found = paired_difference({n: float(n) for n in range(1, 6)}, dict.fromkeys(range(1, 6), 0.0))
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found == Difference(5, 3.0, pytest.approx(3 - half, abs=1e-6), pytest.approx(3 + half, abs=1e-6))
    assert found.verdict == "higher"


def test_it_is_the_interval_of_scipys_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.3, 1, 7), rng.normal(0, 1, 7)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert found is not None
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """2,000 comparisons of 5 seeds with no difference: 95 % +- 1.5 % (three standard errors) say so."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 5, (2000, 5))  # what a seed does to both; pairs take it out
    shown = 0
    for ours, theirs in zip(shared + rng.normal(0, 1, (2000, 5)), shared + rng.normal(0, 1, (2000, 5)), strict=True):
        found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
        assert found is not None
        shown += found.is_shown
    assert shown / 2000 == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([0.5, 0.7, 0.4], "no difference shown"), ([0.1, 0.11, 0.12], "lower"), ([0.9, 0.91, 0.92], "higher")],
)
def test_no_difference_is_told_where_the_interval_holds_0(ours: list[float], verdict: str) -> None:
    found = paired_difference(dict(enumerate(ours)), {0: 0.5, 1: 0.51, 2: 0.52})
    assert found is not None
    assert found.verdict == verdict
    assert found.is_shown == (verdict != "no difference shown")


def test_one_pair_shows_nothing_and_no_pair_is_no_difference() -> None:
    one = paired_difference({0: 0.9}, {0: 0.1, 1: 0.2})
    assert one == Difference(1, pytest.approx(0.8), None, None)
    assert (one.is_shown, one.verdict) == (False, "one pair only: nothing is shown")
    assert paired_difference({0: 0.9}, {1: 0.1}) is None


def test_a_seed_that_failed_is_left_out_of_its_pair_and_told() -> None:
    trials = [trial("vanilla", s, 0.5 + 0.01 * s) for s in range(4)]
    trials += [trial("dpa", s, 0.6 + 0.01 * s) for s in range(3)] + [trial("dpa", 3, None, "failed")]
    result = compared(trials, ["eval.heldout.accuracy"])
    vanilla, dpa = result["metrics"]["eval.heldout.accuracy"]
    assert (result["baseline"], vanilla["difference"]) == ("vanilla", None)
    assert (dpa["num_seeds"], dpa["num_failed"], dpa["values"]) == (3, 1, {"0": 0.6, "1": 0.61, "2": 0.62})
    assert (vanilla["mean"], vanilla["std"]) == (pytest.approx(0.515), pytest.approx(0.0129099, abs=1e-6))
    assert (dpa["difference"]["num_pairs"], dpa["difference"]["mean"]) == (3, pytest.approx(0.1))
    assert dpa["difference"]["verdict"] == "higher"


def test_without_vanilla_the_first_variant_is_what_others_meet() -> None:
    trials = [trial(name, seed, 0.1 * seed) for seed in range(2) for name in ("pmo", "dpa")]
    assert compared(trials, ["eval.heldout.accuracy"])["baseline"] == "pmo"


def test_variants_are_overrides_of_the_recipe() -> None:
    assert variant("cal") == {"method": "cal"}
    assert variant("dpa@proxy_mllm") == {"method": "dpa", "stages.instruct.weights": "uniform"}
    assert variant("cmo@instruct") == {"method": "cmo", "stages.proxy_mllm.weights": "uniform"}
    assert variant("dpa+full-proxy") == {"method": "dpa", "stages.proxy_llm.llm": "full"}


def test_every_variant_runs_at_every_seed_from_the_recipes_on() -> None:
    recipe = load("tiny", ["seed=7"])
    space = comparison(["vanilla", "dpa@instruct"], 2, recipe.to_dict())
    assert [(label["variant"], label["seed"]) for label in space.labels] == [
        ("vanilla", 7), ("dpa@instruct", 7), ("vanilla", 8), ("dpa@instruct", 8),
    ]  # fmt: skip
    assert Grid(space).points[3] == {"method": "dpa", "stages.proxy_mllm.weights": "uniform", "seed": 8}


def test_further_seeds_come_behind_the_others_and_each_point_has_its_own_label() -> None:
    recipe = load("tiny").to_dict()
    few, many = (comparison(["vanilla", "cal", "dpa"], seeds, recipe) for seeds in (2, 5))
    assert Grid(many).points[:6] == Grid(few).points
    for point in Grid(many).points:
        assert many.label(point) == {"variant": point["method"], "seed": point["seed"]}


def test_a_variant_with_wrong_bounds_is_an_error_and_not_left_out() -> None:
    """lower is the default of each method's weights: 0.05 of cmo and dpa, 1 of cal."""
    with pytest.raises(RecipeError, match=r"lower 1.0 > upper 0.3 .* \(of cal in --compare\)") as err:
        comparison(["vanilla", "cal", "dpa"], 2, load("tiny", ["cmo.upper=0.3"]).to_dict())
    assert len(err.value.errors) == 1


def test_wrong_names_are_told_all_at_once() -> None:
    recipe = load("tiny").to_dict()
    with pytest.raises(RecipeError) as err:
        comparison(["dap", "vanilla@instruct", "dpa@proxy_llm", "cmo", "cmo"], 5, recipe)
    text = str(err.value)
    for part in ("'dap'", "same weights everywhere", "'dpa@proxy_llm'", "each name once"):
        assert part in text


def test_a_fully_trained_proxy_takes_no_adapter() -> None:
    tiny = load("tiny").to_dict()
    assert Grid(comparison(["dpa", "dpa+full-proxy"], 1, tiny)).points[1]["stages.proxy_llm.llm"] == "full"
    tiny["stages"]["proxy_llm"]["from"] = "/adapter"
    with pytest.raises(RecipeError, match=r"stages.proxy_llm.llm: expected lora.*dpa\+full-proxy"):
        comparison(["dpa+full-proxy"], 1, tiny)
