"""Does the chunked head give the naive formula's scores and gradients, and keep no logits?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dpa_ray.model import score
from dpa_ray.model.score import TargetScorer
from tests.memory import peak_bytes

WIDTH, VOCABULARY, NUM_TARGETS = 24, 307, 50
CHUNK_BYTES = 4 * VOCABULARY * 7
"""Seven rows: eight chunks, the last of them of one row."""


@dataclass
class Case:
    """A head and its input; `upstream` (N,) is the gradient of each log-probability."""

    hidden: Tensor
    head: nn.Linear
    target: Tensor
    upstream: Tensor


def make_case(dtype: torch.dtype = torch.float32, *, bias: bool = False, num_targets: int = NUM_TARGETS) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        nn.init.normal_(head.weight, std=0.5)
        hidden = torch.randn(num_targets, WIDTH)
        target = torch.randint(0, VOCABULARY - 2, (num_targets,))
        upstream = torch.rand(num_targets) - 0.3
    upstream[1:3] = 0
    return Case(hidden.to(dtype).requires_grad_(), head.to(dtype), target, upstream)


def naive(case: Case, dtype: torch.dtype, softcap: float | None, num_rows: int | None) -> dict[str, Tensor]:
    """Scores and gradients by the formula, in `dtype`."""
    leaves = [case.hidden, *case.head.parameters()]
    copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(*copies)[:, :num_rows]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_prob = logits.log_softmax(1).gather(1, case.target.unsqueeze(1)).squeeze(1)
    grads = torch.autograd.grad(log_prob, copies, case.upstream.to(dtype))
    logit = logits.gather(1, case.target.unsqueeze(1)).squeeze(1)
    return {"log_prob": log_prob, "logit": logit} | dict(zip(("hidden", "weight", "bias"), grads, strict=False))


def ours(case: Case, softcap: float | None, num_rows: int | None) -> dict[str, Tensor]:
    scorer = TargetScorer(case.head, softcap=softcap, num_rows=num_rows, chunk_bytes=CHUNK_BYTES)
    scores = scorer.score(case.hidden, case.target)
    assert not scores.logit.requires_grad
    leaves = [x for x in (case.hidden, *case.head.parameters()) if x.requires_grad]
    grads = torch.autograd.grad(scores.log_prob, leaves, case.upstream.to(scores.log_prob.dtype))
    return {"log_prob": scores.log_prob, "logit": scores.logit} | dict(
        zip(("hidden", "weight", "bias"), grads, strict=False)
    )


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


WAYS = list(itertools.product((False, True), (None, 5.0), (None, VOCABULARY - 2)))


@pytest.mark.parametrize(("bias", "softcap", "num_rows"), WAYS)
def test_scores_and_every_gradient_are_the_naive_formulas(
    bias: bool, softcap: float | None, num_rows: int | None
) -> None:
    """fp32, against the formula in fp32 and in float64: 1e-5 relative, and no more than twice the naive error."""
    case = make_case(bias=bias)
    exact, plain = naive(case, torch.float64, softcap, num_rows), naive(case, torch.float32, softcap, num_rows)
    found = ours(case, softcap, num_rows)
    assert found.keys() == exact.keys() == {"log_prob", "logit", "hidden", "weight", *(["bias"] if bias else [])}
    for name, value in found.items():
        assert error(value, plain[name]) < 1e-5, name
        assert error(value, exact[name]) <= 2 * error(plain[name], exact[name]), name


@pytest.mark.parametrize(("bias", "softcap", "num_rows"), WAYS)
def test_a_frozen_head_gives_the_same_gradient_to_hidden_and_none_to_itself(
    bias: bool, softcap: float | None, num_rows: int | None
) -> None:
    case = make_case(bias=bias)
    exact = naive(case, torch.float64, softcap, num_rows)
    case.head.requires_grad_(False)
    found = ours(case, softcap, num_rows)
    assert found.keys() == {"log_prob", "logit", "hidden"}
    for name, value in found.items():
        assert error(value, exact[name]) < 1e-5, name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("bias", "softcap", "num_rows"), WAYS)
def test_gradcheck(bias: bool, softcap: float | None, num_rows: int | None, frozen: bool) -> None:
    case = make_case(torch.float64, bias=bias, num_targets=5)
    case.head.requires_grad_(not frozen)
    small = nn.Linear(WIDTH, 11, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    scorer = TargetScorer(small, softcap=softcap, num_rows=num_rows and 9, chunk_bytes=4 * 11 * 2)

    def log_prob(hidden: Tensor, *_: Tensor) -> Tensor:
        found: Tensor = scorer.score(hidden, case.target % 9).log_prob
        return found

    assert torch.autograd.gradcheck(log_prob, (case.hidden, *small.parameters()))


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_is_summed_in_fp32(frozen: bool) -> None:
    """Scores leave in fp32, off by the logits' rounding alone (2^-9 of values up to 16); gradients are bf16, rounded a
    few times on their way (2^-8 each)."""
    case = make_case(torch.bfloat16)
    case.head.requires_grad_(not frozen)
    exact = naive(case, torch.float64, None, None)
    found = ours(case, None, None)
    assert found["log_prob"].dtype == found["logit"].dtype == torch.float32
    assert (found["log_prob"] - exact["log_prob"]).abs().max() < 0.06
    for name in found.keys() - {"log_prob", "logit"}:
        assert found[name].dtype == torch.bfloat16
        assert error(found[name], exact[name]) < 2**-6, name


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_products_in_fp32_leave_no_rounding_in_scores(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, softcap: float | None
) -> None:
    """As GPUs give them; CPUs have none, so they are made of fp32 copies here (tests/gpu/test_score.py has the real ones)."""
    monkeypatch.setattr(score, "_product", lambda left, right: left.float() @ right.float())
    case = make_case(torch.bfloat16, bias=True)
    case.head.requires_grad_(not frozen)
    exact = naive(case, torch.float64, softcap, None)
    found = ours(case, softcap, None)
    assert (found["log_prob"] - exact["log_prob"]).abs().max() < 1e-5
    assert (found["logit"] - exact["logit"]).abs().max() < 1e-5
    for name in found.keys() - {"log_prob", "logit"}:
        assert found[name].dtype == torch.bfloat16
        assert error(found[name], exact[name]) < 2**-7, name


def test_a_trained_heads_gradient_loses_nothing_over_many_parts_of_rows() -> None:
    """512 parts, all in the same direction. In bf16 a sum of 256 would not notice one more: half of it would be missing.
    2^-8: what leaves is rounded to bf16 once, and so is each slope."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=0.1, generator=generator)
    hidden = (1 + 0.1 * torch.randn(4096, 8, generator=generator)).bfloat16().requires_grad_()
    case = Case(hidden, head, torch.zeros(4096, dtype=torch.long), torch.ones(4096))
    scorer = TargetScorer(head, softcap=None, num_rows=None, chunk_bytes=4 * 8 * 8)
    scorer.score(hidden, case.target).log_prob.sum().backward()
    assert head.weight.grad is not None
    assert error(head.weight.grad, naive(case, torch.float64, None, None)["weight"]) < 2**-8


def test_tied_embeddings_get_both_gradients() -> None:
    case = make_case()
    ids = torch.arange(NUM_TARGETS)
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    case.head.weight = embedding.weight
    scorer = TargetScorer(case.head, softcap=None, num_rows=None, chunk_bytes=CHUNK_BYTES)
    found = torch.autograd.grad(scorer.score(embedding(ids), case.target).log_prob.sum(), embedding.weight)[0]
    weight = embedding.weight.detach().clone().requires_grad_()
    log_prob = (weight[ids] @ weight.t()).log_softmax(1).gather(1, case.target.unsqueeze(1))
    assert error(found, torch.autograd.grad(log_prob.sum(), weight)[0]) < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_that_of_a_chunk(frozen: bool) -> None:
    """1,000 rows of 4,096 logits are 16 MB, the weight's gradient 1 MB: forward and backward hold less than 3 MB."""
    head = nn.Linear(64, 4096, bias=False).requires_grad_(not frozen)
    hidden, target = torch.randn(1000, 64, requires_grad=True), torch.randint(0, 4096, (1000,))
    scorer = TargetScorer(head, softcap=None, num_rows=None, chunk_bytes=2**19)
    assert peak_bytes(lambda: scorer.score(hidden, target).log_prob.sum().backward()) < 3 * 2**20
