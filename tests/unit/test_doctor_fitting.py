"""Is an estimate held against what there is, and of an elastic run the worst one? And what is written, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpa_ray.doctor import cost, fitting, memory
from dpa_ray.doctor.findings import Check, Findings
from dpa_ray.doctor.fitting import Device, Fit
from dpa_ray.doctor.memory import Counts, Estimate
from dpa_ray.recipe import Recipe
from tests.random_models import make_llm

NOTHING = Estimate(weights=0, gathered=0, gradients=0, masters=0, moments=0, buckets=0, activations=0, loss=0, reserve=0,
                   update=0, start=0)  # fmt: skip


def fit_on(made: Recipe) -> Fit:
    """Stage 1 of a small decoder on the meta device."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(make_llm("llama").config)
    counts = memory.count(llm, llm.get_output_embeddings())
    return fitting.fit(made, "proxy_llm", llm, counts, None, 20, on_gpu=True)


def test_an_elastic_run_has_to_fit_on_its_fewest_workers(recipe: Callable[..., Recipe]) -> None:
    """Fewer hold larger parts, and more samples each."""
    elastic, two, eight = (
        fit_on(recipe("engine=deepspeed", f"cluster.workers={workers}")) for workers in ("{min: 2, max: 8}", "2", "8")
    )
    assert elastic == two
    for way in (1, 2, 3):
        assert elastic.estimates[way].total > eight.estimates[way].total


def judged(made: Recipe, needs_bytes: int, there_bytes: int, at_max_length: int = 0) -> Check:
    """What is said of a stage that needs `needs_bytes` of a GPU with `there_bytes`."""
    way = made.deepspeed.zero_stage if made.engine == "deepspeed" else None
    of = {way: replace(NOTHING, weights=needs_bytes)}
    most = {way: replace(NOTHING, weights=at_max_length or needs_bytes)}
    check = Check("memory")
    fitting.judge([Fit("instruct", 20, of, most)], made, Device("GPU", there_bytes, True), check, Findings())
    return check


def test_a_stage_is_warned_of_before_it_fails(recipe: Callable[..., Recipe]) -> None:
    """An estimate may be a little too low."""
    made = recipe()
    fits = judged(made, 89 * 2**30, 100 * 2**30)
    assert (fits.warnings, fits.failures) == ([], [])
    near = judged(made, 95 * 2**30, 100 * 2**30)
    assert near.failures == []
    assert len(near.warnings) == 1
    assert near.warnings[0].startswith("instruct: about 95.0 GiB come near to the 100.0 GiB of a GPU; lower ")
    over = judged(made, 105 * 2**30, 100 * 2**30)
    assert over.warnings == []
    assert "expected at most the 100.0 GiB of a GPU, found a need of about 105.0 GiB" in over.failures[0]
    long = judged(made, 50 * 2**30, 100 * 2**30, at_max_length=105 * 2**30)
    assert len(long.warnings) == 1
    assert "as long as max_length would need about 105.0 GiB" in long.warnings[0]


@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("bf16", 2)])
def test_what_a_run_writes_by_hand(precision: str, item: int, recipe: Callable[..., Recipe]) -> None:
    """Of a checkpoint 12 bytes for each trained parameter; one more than are kept, until the new one is whole."""
    made = recipe(f"precision={precision}", "checkpoint.keep=3")
    numbers = {"frozen": 1000, "small": 0, "width": 1, "num_rows": 1, "head_is_trained": False}
    trained = {"proxy_llm": 10, "proxy_mllm": 20, "instruct": 500}
    counts = {stage: Counts(trained=num, **numbers) for stage, num in trained.items()}
    expected = {
        "data": 77, "proxy-llm": 10 * item, "proxy-merged": 900 * item, "proxy-mllm": 20 * item,
        "instruct": 1500 * item, "checkpoints at once": (3 + 1) * 12 * 500,
    }  # fmt: skip
    assert cost.written_bytes(made, counts, llm=900, data=77) == expected
    bucket = made.model_copy(update={"store": "s3://bucket/x"})
    assert cost.written_bytes(bucket, counts, llm=900, data=77) == expected | {"model": 1500 * item}
