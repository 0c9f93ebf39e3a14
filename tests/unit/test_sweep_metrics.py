"""Are the metrics that a sweep may be judged by those that its trials tell, and no others?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpa_ray.batch import Batch
from dpa_ray.data.cursor import Cursor
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.recipe import RecipeError, load
from dpa_ray.sweep.main import Options, make_plan_of
from dpa_ray.sweep.measures import Running, problem, stage_keys
from tests.random_models import batch_of, make_step, make_vlm

SETTINGS = OptimizerSettings(betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0)
SAMPLES = ["s3 I g2 t3", "s2 I s1 t4 s1 u3"]


@pytest.mark.parametrize(("weights", "method"), [("prob", "dpa"), ("uniform", "vanilla")])
def test_they_are_what_a_trained_stage_tells(weights: str, method: str) -> None:
    """The real loop over data whose visual words are known."""
    step = make_step(make_vlm(), weights).train()
    for name, parameter in step.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    cursor = Cursor([len(SAMPLES)], seed=0, global_batch_size=2, window=100)
    plan = Plan(cursor, 2, rank=0, world_size=1, micro_batch_size=2)
    running = Running("instruct", 2)

    def batches() -> Iterator[Batch]:
        for rows, _ in plan:
            batch = batch_of([SAMPLES[row] for row in rows])
            batch.ids, batch.rows = [str(row) for row in rows], [("data", int(row)) for row in rows]
            yield batch

    train(
        PlainEngine(step, SETTINGS, torch.device("cpu")), batches(), plan, Schedule(2, 1e-3, 0.5), stage="instruct",
        seed=0, device=torch.device("cpu"), record=lambda line, _: running.add(line),
    )  # fmt: skip
    assert {f"instruct.{key}" for key in stage_keys(load("tiny", [f"method={method}"]), "instruct")} == set(
        running.values()
    )


@pytest.mark.parametrize(
    ("metric", "overrides", "told"),
    [
        ("instruct.nonsense", [], "one of loss, nll_mean"),
        ("instruct.lr", [], "one of loss, nll_mean"),
        ("instruct.accuracy", [], "one of loss, nll_mean"),
        ("instruct.nll_mean.x", [], "one of loss, nll_mean"),
        ("instruct.eval_num_targets", ["eval.every_steps=5"], "eval_nll"),
        ("instruct.gain_auc", ["method=vanilla"], "weight_mean_style, found"),
        ("instruct.nll_mean_visual", ["data.instruct={source: /a.json}"], "tokens_per_s, found"),
        ("proxy_llm.nll_mean", ["method=vanilla"], "(proxy_mllm, instruct), found proxy_llm.nll_mean: with method vanilla"),
        ("proxy_mllm.nll_mean", ["stages.proxy_mllm.from=/c"], "stages.proxy_mllm.from"),
        ("proxy_llm.nll_mean", [], None),
        ("proxy_mllm.gain_auc", [], None),
        ("instruct.eval_visual_nll", ["eval.every_steps=5"], None),
        ("instruct.nll_mean_visual", ["data.instruct={source: /m.yaml}"], None),
    ],
)  # fmt: skip
def test_a_name_that_no_stage_tells_is_wrong(metric: str, overrides: list[str], told: str | None) -> None:
    found = problem(metric, load("tiny", overrides))
    assert found is None if told is None else told in str(found), found


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("sweep: {metric: proxy_llm.nll_mean}\nmethod: [dpa, vanilla]\n", "sweep.metric: expected a stage that is trained"),
        ("sweep: {metric: instruct.gain_auc}\nstages.instruct.weights: [prob, uniform]\n", "stages.instruct.weights=uniform"),
        ("sweep: {asha: {metric: instruct.nl_mean, grace_steps: 9}}\nseed: [0, 1]\n", "sweep.asha.metric: expected instruct.KEY"),
        ("sweep: {metric: proxy_llm.nll_mean}\nmethod: [dpa, pmo]\nseed: {choice: [0, 1]}\n", None),
    ],
)  # fmt: skip
def test_it_is_asked_of_every_recipe_of_the_sweep(space: str, told: str | None, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(space)
    options = Options(space=file, search="random", trials=2)
    if told is None:
        make_plan_of(load("tiny"), options)
        return
    with pytest.raises(RecipeError) as err:
        make_plan_of(load("tiny"), options)
    assert told in str(err.value)


def test_a_comparison_is_judged_by_what_all_its_methods_tell() -> None:
    options = Options(compare=("dpa", "vanilla"), seeds=3, metric="proxy_llm.nll_mean")
    with pytest.raises(RecipeError, match=r"at method=vanilla"):
        make_plan_of(load("tiny"), options)
