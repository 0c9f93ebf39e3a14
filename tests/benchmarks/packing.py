"""How much time does packing save a step of stage 1, on captions of varied length?

Both ways train the same samples with the same small LLM (random weights); rounds alternate, the medians are compared.

    python tests/benchmarks/packing.py --micro-batch 8 --width 128 --layers 2 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpa_ray.batch import NO_TURN, Batch, Encoded
from dpa_ray.data.collate import collate
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.step import StepModule
from dpa_ray.pack import pack

MAX_LENGTH = 8192


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="of one step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--median-tokens", type=float, default=100, help="of a caption; lengths are log-normal")
    parser.add_argument("--spread", type=float, default=0.5, help="sigma of the lengths' logarithm")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def captions(args: argparse.Namespace) -> list[Encoded]:
    """Random tokens of log-normal lengths; every token but the first is a target."""
    generator = np.random.default_rng(args.seed)
    lengths = np.exp(generator.normal(np.log(args.median_tokens), args.spread, args.samples)).astype(int)
    samples = []
    for length in np.clip(lengths, 2, MAX_LENGTH):
        target = np.arange(length) > 0
        turn = np.where(target, 0, NO_TURN).astype(np.int32)
        ids = generator.integers(0, args.vocabulary, length)
        samples.append(Encoded(ids, target, turn, np.zeros(length, bool), 0))
    return samples


def passes(samples: list[Encoded], micro_batch: int, *, packing: bool) -> list[Batch]:
    batches = []
    for start in range(0, len(samples), micro_batch):
        part = samples[start : start + micro_batch]
        batches.append(
            Batch.of(
                collate(
                    part,
                    [],
                    pad_token_id=0,
                    image_token_id=-1,
                    rows=[("", start + i) for i in range(len(part))],
                    ids=[None] * len(part),
                    layout=pack([len(e.input_ids) for e in part], MAX_LENGTH) if packing else None,
                )
            )  # fmt: skip
        )
    return batches


def engine(args: argparse.Namespace) -> PlainEngine:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=max(1, args.width // 64), max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attention).train()
    module = StepModule(model, Weighting("uniform", 1.0, 1.0, 1), softcap=None, num_softmax_rows=None)
    return PlainEngine(module, OptimizerSettings((0.9, 0.999), 0.0, 1.0), torch.device(args.device))


def step_s(trained: PlainEngine, batches: list[Batch]) -> tuple[float, float]:
    """(seconds, loss) of one optimizer step with learning rate 0: every round is the same work."""
    start = time.perf_counter()
    loss = weight = 0.0
    for i, batch in enumerate(batches):
        sums = trained.forward(batch)
        loss, weight = loss + sums.loss.item(), weight + sums.weight.item()
        trained.backward(sums.loss, last=i == len(batches) - 1)
    trained.update(weight, 0.0)
    return time.perf_counter() - start, loss / weight


def main() -> None:
    args = arguments()
    samples, trained = captions(args), engine(args)
    ways = {name: passes(samples, args.micro_batch, packing=name == "packed") for name in ("unpacked", "packed")}
    losses = {name: step_s(trained, batches)[1] for name, batches in ways.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, batches in ways.items():
            times[name].append(step_s(trained, batches)[0])
    print(f"{args.samples} captions, micro-batch {args.micro_batch}, {args.attention} on {args.device}")
    print(f"{'':10}{'step s':>9}{'fastest':>9}{'slowest':>9}{'efficiency':>12}{'tokens/s':>10}{'loss':>12}")
    for name, batches in ways.items():
        tokens = sum(batch.num_tokens for batch in batches)
        slots = sum(map(trained.module.num_slots, batches))
        median = statistics.median(times[name])
        print(
            f"{name:10}{median:9.3f}{min(times[name]):9.3f}{max(times[name]):9.3f}{tokens / slots:12.3f}"
            f"{tokens / median:10.0f}{losses[name]:12.6f}"
        )
    ratios = [one / other for one, other in zip(times["packed"], times["unpacked"], strict=True)]
    print(f"packed / unpacked step time, median of {args.rounds} rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
