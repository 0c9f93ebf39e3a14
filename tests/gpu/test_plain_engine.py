"""Does the plain engine train on a GPU as on the CPU, and give the GPU back? Needs torch, transformers, peft, pydantic and pyarrow.

pytest tests/gpu, with --noconftest where nothing else is installed
"""

from __future__ import annotations

import gc

import pytest
import torch

from dpa_ray.engine.plain import PlainEngine
from tests.engine_worker import SETTINGS, STEPS, Case, make_module, take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def trained(device: str, trained: str = "full", *, bf16: bool = False) -> PlainEngine:
    """An engine after all STEPS."""
    engine = PlainEngine(make_module(Case(None, bf16=bf16, trained=trained)), SETTINGS, torch.device(device))
    for step in range(len(STEPS)):
        take_step(engine, step)
    return engine


@pytest.mark.parametrize("what", ["full", "lora", "connector"])
def test_steps_in_fp32_are_the_cpus(what: str) -> None:
    expected, found = trained("cpu", what), trained("cuda", what)
    names = [name for name, p in expected.module.model.named_parameters() if p.requires_grad]
    ours, theirs = found.gather(names), expected.gather(names)
    for name in names:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("bf16", [False, True])
def test_a_closed_engine_gives_the_gpu_back(bf16: bool) -> None:
    trained("cuda", bf16=bf16).close()  # cuBLAS keeps its workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = trained("cuda", bf16=bf16)
    module = engine.module
    assert torch.cuda.memory_allocated() > before + 100_000
    engine.close()
    del engine
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    assert module is not None
    assert left < 20_000
