"""Every attention that a GPU has: is a step in bf16 what it is on the CPU in fp32? Needs torch, transformers, peft, pydantic and pyarrow.

pytest tests/gpu, with --noconftest where nothing else is installed
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.random_models import batch_of, make_step, make_vlm, packed_of

MIXED = ["s1 I t6", "s3 I s4 t3 s2 I u9", "s5 t4 s2 u3", "s1 I t30"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_a_step_is_the_cpus(attention: str, packed: bool) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    sizes = {"hidden_size": 128, "head_dim": 32}  # kernels want 16 a head at least
    usual = make_step(make_vlm("llama", **sizes), "prob").train()
    module = make_step(make_vlm("llama", attention=attention, dtype=torch.bfloat16, **sizes), "prob").train()
    batch = batch_of(MIXED)
    if packed:
        batch = packed_of(batch, [[1, 0], [3, 2]])
    expected = usual(batch)
    found = module.cuda()(replace(batch).to("cuda"))
    (found.loss / found.weight).backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)
    with torch.no_grad():
        assert float(found.loss / found.weight) == pytest.approx(float(expected.loss / expected.weight), rel=0.05)
