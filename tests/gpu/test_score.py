"""Are scores on a GPU in bf16 those of the bf16 weights, with nothing rounded to bf16 on the way? Needs torch, transformers, peft, pydantic and pyarrow."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_score import WAYS, error, make_case, naive, ours

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("bias", "softcap", "num_rows"), WAYS)
def test_scores_in_bf16_are_exact(bias: bool, softcap: float | None, num_rows: int | None, frozen: bool) -> None:
    case = make_case(torch.bfloat16, bias=bias)
    exact = naive(case, torch.float64, softcap, num_rows)
    case.hidden = case.hidden.detach().cuda().requires_grad_()
    case.head = case.head.cuda().requires_grad_(not frozen)
    case.target, case.upstream = case.target.cuda(), case.upstream.cuda()
    found = {name: values.cpu() for name, values in ours(case, softcap, num_rows).items()}
    assert (found["log_prob"] - exact["log_prob"]).abs().max() < 1e-4
    assert (found["logit"] - exact["logit"]).abs().max() < 1e-4
    for name in found.keys() - {"log_prob", "logit"}:
        assert error(found[name], exact[name]) < 2**-7, name
