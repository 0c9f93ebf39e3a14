"""Is a stage trained in the order that is its own?"""

from __future__ import annotations

from collections.abc import Callable

from dpa_ray.engine import assembling
from dpa_ray.recipe import Recipe
from dpa_ray.stages.pipeline import Pipeline, make_plan
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import TrainTask
from dpa_ray.store.fs import Store


def test_stage_two_takes_the_samples_of_stage_one_in_another_order(recipe: Callable[..., Recipe]) -> None:
    """Every epoch of both has each of them once."""
    made = recipe("data.eval=null", "data.pretrain.options.size=40")
    store = Store(made.store)
    plan = make_plan(made, store, make=True, report=lambda _: None)
    pipeline = Pipeline(plan, store, Run(store, made), report=lambda _: None)

    def rows(stage: str) -> list[int]:
        task = pipeline._task(stage)
        assert isinstance(task, TrainTask)
        cursor = assembling.cursor_of(task, store)
        return [int(row) for step in range(cursor.steps_per_epoch) for row in cursor.rows(0, step)]

    one, two = rows("proxy_llm"), rows("proxy_mllm")
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two
