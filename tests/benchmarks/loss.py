"""The loss from hidden states: which way of computing it is best on this device?

Ways, interleaved round by round, of the same sum of w * nll with the weights known only after the forward (w = clamp of
p - q, p = exp(-nll)), forward and backward:
  naive   all logits at once, in float32
  ours    dpa_ray.model.score
  torch   torch.nn.functional.linear_cross_entropy in chunks (`--rows` a chunk; 0 is its own choice)
  liger   Liger's fused linear cross entropy (on CUDA, where liger-kernel 0.8.5 or later is installed)
With the head trained (stage 3) and frozen (stage 2). Errors are against float64 from the same weights: of the log-probabilities
the largest, in nats; of a gradient the norm of the difference by the norm.

    python -m tests.benchmarks.loss
    python -m tests.benchmarks.loss --model llama-3.1-8b --targets 2048 --device cuda

The second form was not run: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa_ray.model.score import TargetScorer
from tests.benchmarks.cmo_step import CMO, llm_config
from tests.memory import peak_bytes

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(N,) log-probabilities of targets (N,) from hidden states (N, D)."""
Q = 0.1


def ways(head: nn.Linear, device: str, rows: int) -> dict[str, LogProb]:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows or None)
    found: dict[str, LogProb] = {
        "naive": lambda hidden, target: -functional.cross_entropy(head(hidden).float(), target, reduction="none"),
        "ours": lambda hidden, target: scorer.score(hidden, target).log_prob,
        "torch": lambda hidden, target: (
            -functional.linear_cross_entropy(hidden, head.weight, target, reduction="none", options=options).float()
        ),
    }
    scorer = TargetScorer(head, softcap=None, num_rows=None)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        fused = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
        found["liger"] = lambda hidden, target: -fused(head.weight, hidden, target)
    return found


def gradients(way: LogProb, head: nn.Linear, hidden: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradients by hidden states and, where it is trained, the head."""
    leaf = hidden.detach().requires_grad_()
    log_prob = way(leaf, target)
    weight = (log_prob.detach().exp() - Q).clamp(CMO.lower, CMO.upper)
    leaves = [leaf, *(p for p in head.parameters() if p.requires_grad)]
    return log_prob.detach(), list(torch.autograd.grad(-(weight * log_prob).sum(), leaves))


def exact(head: nn.Linear, hidden: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """In float64, with the weights of its own p."""
    copy = nn.Linear(1, 1, bias=False)
    copy.weight = nn.Parameter(head.weight.detach().double(), requires_grad=head.weight.requires_grad)
    return gradients(
        lambda h, t: -functional.cross_entropy(copy(h), t, reduction="none"), copy, hidden.double(), target
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "llama-3.1-8b", "qwen2.5-7b"), default="small")
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--rows", type=int, default=64, help="targets in a chunk of torch's way; 0: its own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = llm_config(args.model)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=args.device)
    target = torch.randint(0, config.vocab_size, (args.targets,), device=args.device)
    # Hidden states that lean to their target, some more than others: p from 0 to near 1, as in training.
    lean = torch.rand(args.targets, 1, device=args.device) * 30
    with torch.no_grad():
        nn.init.normal_(head.weight, std=0.02)
        own = functional.normalize(head.weight[target].float(), dim=1) * lean / (0.02 * config.hidden_size**0.5)
        hidden = (torch.randn(args.targets, config.hidden_size, device=args.device) + own).to(dtype)
    kind = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{args.model}, {args.targets} targets, {dtype}, {kind}, medians of {args.rounds} rounds")
    print(f"{'head':8}{'way':8}{'ms':>9}{'/ours':>8}{'peak MiB':>10}{'log p':>10}{'d hidden':>10}{'d head':>10}")
    for frozen in (False, True):
        head.requires_grad_(not frozen)
        found = ways(head, args.device, args.rows)
        wanted, wanted_grads = exact(head, hidden, target)
        times: dict[str, list[float]] = {name: [] for name in found}
        for number in range(args.rounds + 1):
            for name in found if number % 2 else reversed(found):
                start = time.perf_counter()
                gradients(found[name], head, hidden, target)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
        for name, way in found.items():
            log_prob, grads = gradients(way, head, hidden, target)
            peak = peak_bytes(functools.partial(gradients, way, head, hidden, target), args.device)
            ratio = statistics.median(a / b for a, b in zip(times[name][1:], times["ours"][1:], strict=True))
            errors = [float((log_prob.double() - wanted).abs().max())]
            errors += [relative(a, b) for a, b in zip(grads, wanted_grads, strict=True)]
            print(
                f"{'frozen' if frozen else 'trained':8}{name:8}{statistics.median(times[name][1:]) * 1e3:9.1f}{ratio:8.2f}"
                f"{peak / 2**20:10.1f}" + "".join(f"{error:10.1e}" for error in errors),
                flush=True,
            )


if __name__ == "__main__":
    main()
