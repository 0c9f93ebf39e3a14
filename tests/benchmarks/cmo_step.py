"""What does contrastive weighting cost a training step, and what did the released form of it cost?

Variants of a step on the same weights and samples, interleaved round by round:
  vanilla   weights of 1, the head on target positions only
  released  what the released code does (tests/benchmarks/released_form.py)
  live      ours: q from the text alone, the head in chunks of target positions
  cached    ours, q handed in with the batch (stage 2 only: there the LLM is frozen)
  whole     vanilla as others take it: every layer at all positions, and the head on target positions only
Stage 2 trains the connector, stage 3 the LLM too. The tower is left out: its features are data, the same in all
variants. A ratio is the median over rounds of two times of one round. Beside it: the same of CPU times, which other
processes disturb less (with OMP_WAIT_POLICY=passive), and of the matrix products that the mathematics needs (no
recomputation; causal attention is half a square), counted from the shapes.

    python -m tests.benchmarks.cmo_step --rounds 7 --out FILE
    python -m tests.benchmarks.cmo_step --stage 2 --model llama-3.1-8b --device cuda

The second form was not run: no GPU was at hand. There each variant takes the largest micro-batch it can hold, times are
compared by sample, and stage 3 drops its gradients as they come, as the optimizer's state does not fit beside 8B weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from dpa_ray.batch import IGNORE_INDEX, NO_TURN, Batch
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model import step
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.packed import positions_of
from dpa_ray.model.step import StepModule, StepSums
from dpa_ray.stages.build import compile_layers
from tests.benchmarks.released_form import ReleasedStep
from tests.memory import peak_bytes

NUM_PATCHES, TOWER_WIDTH = 576, 1024
TEXT = {2: (0, 0, 60), 3: (20, 180, 100)}
"""Tokens before the image, behind it and in the answer, by stage: only the last are targets."""
VARIANTS = {2: ("vanilla", "released", "live", "cached", "whole"), 3: ("vanilla", "released", "live", "whole")}
BASES = ("vanilla", "whole", "released")
"""What the others are compared with."""
UNIFORM = Weighting("uniform", 1.0, 1.0, 1)
CMO = Weighting("prob", 0.05, 0.5, 3)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, from the makers' data sheets."""
CPU_MICRO_BATCH = 2


def llm_config(model: str) -> Any:
    if model == "small":
        return LlamaConfig(
            vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048,
        )  # fmt: skip
    if model == "llama-3.1-8b":
        return LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        )  # fmt: skip
    return Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip


class FeatureTower(nn.Module):
    """A vision tower whose pixel values are its features already, (I, P, width)."""

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        return argparse.Namespace(hidden_states=(pixel_values,))


class WholeTrunk(StepModule):
    """A step that computes the last layer at all positions, too."""

    def forward(self, batch: Batch) -> StepSums:
        with patch.object(step, "only_read", lambda *_: nullcontext()):
            return super().forward(batch)


class NoLayers(nn.Module):
    """A decoder that returns its input: hidden states as given, a leaf."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        return argparse.Namespace(last_hidden_state=inputs_embeds.detach().requires_grad_())


class LossOnly(nn.Module):
    """A causal LLM without layers, with embeddings and head of `model`: a step of it is its loss alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach())
        self.head = model.get_output_embeddings()
        self.base_model = NoLayers(model.config.text_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def make_model(name: str, stage: int, device: str) -> Any:
    """Random weights; fp32 on a CPU, else bf16. Stage 2 trains the connector alone, stage 3 all that is there."""
    torch.manual_seed(0)
    config = llm_config(name)
    tower = CLIPVisionConfig(hidden_size=TOWER_WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=16)
    whole = LlavaConfig(
        vision_config=tower, text_config=config, image_token_index=config.vocab_size - 1, vision_feature_layer=0,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        model = LlavaForConditionalGeneration(whole).train()
    torch.set_default_dtype(torch.float32)
    model.model.vision_tower = FeatureTower()
    model.requires_grad_(stage == 3)
    model.model.multi_modal_projector.requires_grad_(True)
    assert config._attn_implementation == "sdpa"
    return model


def make_batch(stage: int, size: int, vocabulary: int, device: str, padding: int = 0) -> Batch:
    """Samples of equal length, or all but the first shorter by `padding`."""
    before, behind, answer = TEXT[stage]
    length = before + NUM_PATCHES + behind + answer
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary - 1, (size, length), generator=generator)
    image = torch.zeros(size, length, dtype=torch.bool)
    image[:, before : before + NUM_PATCHES] = True
    ids[image] = vocabulary - 1
    index, ends = torch.arange(length), torch.full((size, 1), length)
    ends[1:] -= padding
    real = index < ends
    is_target = real & ~image & (index >= ends - answer)
    labels = torch.where(is_target, ids, IGNORE_INDEX)
    turn = torch.where(labels != IGNORE_INDEX, 0, NO_TURN).int()
    features = torch.randn(size, NUM_PATCHES, TOWER_WIDTH, generator=generator)
    batch = Batch(
        ids, real.long(), labels, turn, torch.zeros_like(image), image, features, size, int(real.sum()),
        int(is_target.sum()),
    )  # fmt: skip
    return batch.to(device)


def with_q(batch: Batch, module: StepModule) -> Batch:
    """The batch with q as the job would have joined it."""
    row, column = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    scores, has = module._blind(batch, row, positions_of(batch)[row, column], batch.labels[row, column])
    log_q, logit = torch.zeros(batch.labels.shape), torch.zeros(batch.labels.shape)
    log_q[row, column] = torch.where(has, scores.log_prob, -torch.inf).cpu()
    logit[row, column] = scores.logit.cpu()
    return replace(batch, log_q=log_q, blind_logit=logit).to(str(batch.labels.device))


def num_flops(variant: str, stage: int, config: Any) -> float:
    """Of the matrix products of one sample's step."""
    width, depth, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads
    attended = 2 * width  # multiply-adds of a query with one key and its value
    linear = width * width * (2 + 2 * config.num_key_value_heads / heads) + 3 * width * config.intermediate_size
    before, behind, answer = TEXT[stage]
    text = before + behind + answer
    length = text + NUM_PATCHES

    def forward(tokens: int) -> tuple[float, float]:
        return 2 * depth * tokens * linear, 2 * depth * attended * tokens * tokens / 2

    weights, attention = forward(length)
    products = 2 if stage == 2 else 3  # forward, by input, and by weight where it is trained
    connector = 2 * NUM_PATCHES * (2 * TOWER_WIDTH * width + 3 * width * width)
    trunk = products * weights + 3 * attention + connector
    head = 2 * width * vocabulary
    if variant == "released":
        return trunk + weights + attention + head * length * (products + 1)
    if variant == "whole":
        return trunk + head * answer * products
    by_position = 2 * (2 * width * width + 3 * width * config.intermediate_size)  # of the last layer, where it is read
    unread = by_position * (length - answer) * products
    blind = sum(forward(text)) - by_position * (text - answer) + head * answer if variant == "live" else 0
    return trunk - unread + head * answer * products + blind


@dataclass
class Setting:
    """The steps of one stage: `modules` by variant share `engine`'s parameters and optimizer."""

    modules: dict[str, Any]
    engine: PlainEngine | None  # None: gradients are dropped as they come
    batches: dict[str, Batch]

    def step(self, variant: str) -> float:
        """Its loss. Learning rate 0: every round is the same work."""
        sums = self.modules[variant](self.batches[variant])
        if self.engine is None:
            sums.loss.backward()
        else:
            self.engine.backward(sums.loss, last=True)
            self.engine.update(float(sums.weight), 0.0)
        return float(sums.loss.detach() / sums.weight)

    def seconds(self, variant: str) -> tuple[float, float]:
        """Of the clock, and of this process's CPU time."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.step(variant)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu_start


def make_module(variant: str, model: Any) -> Any:
    if variant == "released":
        return ReleasedStep(StepModule(model, CMO, softcap=None, num_softmax_rows=None))
    kind = WholeTrunk if variant == "whole" else StepModule
    return kind(model, UNIFORM if variant in ("vanilla", "whole") else CMO, softcap=None, num_softmax_rows=None)


def make_setting(
    stage: int, name: str, device: str, *, compiled: bool = False, padding: int = 0
) -> tuple[Setting, Callable[[str, int], Batch]]:
    model = make_model(name, stage, device)
    if compiled:
        compile_layers(model.model.language_model)
    modules = {variant: make_module(variant, model) for variant in VARIANTS[stage]}
    engine = None
    if device == "cpu" or stage == 2:
        engine = PlainEngine(modules["vanilla"], OptimizerSettings((0.9, 0.999), 0.0, 1.0), torch.device(device))
    else:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def batch_of(variant: str, size: int) -> Batch:
        batch = make_batch(stage, size, model.config.text_config.vocab_size, device, padding)
        return with_q(batch, modules["live"]) if variant == "cached" else batch

    return Setting(modules, engine, {}), batch_of


def largest_micro_batch(variant: str, setting: Setting, batch_of: Callable[[str, int], Batch]) -> int:
    """By doubling; steps of half of that in between."""
    held = 0
    for size in (size for power in range(1, 11) for size in (2**power, 3 * 2 ** (power - 1))):
        try:
            setting.batches[variant] = batch_of(variant, size)
            setting.step(variant)
        except torch.OutOfMemoryError:
            break
        held = size
    for parameter in setting.modules[variant].parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    if held == 0:
        raise SystemExit(f"{variant}: a micro-batch of 2 does not fit")
    return held


def loss_peak_bytes(variant: str, setting: Setting, device: str) -> int:
    """Of the same step from given hidden states to their gradient and the head's."""
    whole = setting.modules[variant]
    model = LossOnly(whole.model)
    alone = make_module(variant, model)
    batch = setting.batches[variant]

    def call() -> None:
        alone(batch).loss.backward()

    found = peak_bytes(call, device)
    model.head.weight.grad = None
    return found


def measure(stage: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    setting, batch_of = make_setting(stage, args.model, args.device, compiled=args.compile, padding=args.padding)
    variants = VARIANTS[stage]
    sizes = {
        v: CPU_MICRO_BATCH if args.device == "cpu" else largest_micro_batch(v, setting, batch_of) for v in variants
    }
    setting.batches.update({v: batch_of(v, sizes[v]) for v in variants})
    losses = {v: setting.step(v) for v in variants}  # also the warm-up
    if "cached" in losses and sizes["cached"] == sizes["live"]:
        torch.testing.assert_close(losses["cached"], losses["live"], rtol=1e-5, atol=0)
    times: dict[str, list[float]] = {v: [] for v in variants}
    cpu_times: dict[str, list[float]] = {v: [] for v in variants}
    for number in range(args.rounds):
        for v in variants if number % 2 else variants[::-1]:
            for kept, found in zip((times[v], cpu_times[v]), setting.seconds(v), strict=True):
                kept.append(found)
        print(f"stage {stage}, round {number}:", {v: round(times[v][-1], 3) for v in variants}, file=sys.stderr)
    config = llm_config(args.model)
    kind = torch.cuda.get_device_name() if args.device != "cpu" else ""
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    flops = {v: num_flops(v, stage, config) for v in variants}

    def ratio(times: dict[str, list[float]], v: str, other: str) -> float:
        return statistics.median(
            one / sizes[v] / (two / sizes[other]) for one, two in zip(times[v], times[other], strict=True)
        )

    rows = [
        {
            "stage": stage, "model": args.model, "variant": v, "step_time_s": times[v],
            "loss_peak_bytes": loss_peak_bytes(v, setting, args.device),
            "peak_bytes": peak_bytes(lambda v=v: setting.step(v), args.device),
            "tokens_per_s": setting.batches[v].num_tokens / statistics.median(times[v]),
            "floor_ratio": flops[v] / flops["vanilla"],
        }
        for v in variants
    ]  # fmt: skip
    print(f"\nstage {stage}, {args.model}, {args.device} {kind}, medians of {args.rounds} rounds")
    columns = "".join(f"{'/' + base:>11}{'(CPU':>7}{'FLOPs)':>7}" for base in BASES)
    print(
        f"{'':10}{'batch':>6}{'step s':>8}{columns}{'tokens/s':>10}{'MFU':>6}{'loss MiB':>10}{'peak MiB':>10}{'loss':>9}"
    )
    for v, row in zip(variants, rows, strict=True):
        median = statistics.median(times[v])
        mfu = f"{flops[v] * sizes[v] / median / peak_flops:.2f}" if peak_flops else "-"
        ratios = "".join(
            f"{ratio(times, v, base):11.3f}{ratio(cpu_times, v, base):7.3f}{flops[v] / flops[base]:7.3f}"
            for base in BASES
        )
        print(
            f"{v:10}{sizes[v]:6}{median:8.3f}{ratios}{row['tokens_per_s']:10.0f}{mfu:>6}"
            f"{row['loss_peak_bytes'] / 2**20:10.1f}{row['peak_bytes'] / 2**20:10.1f}{losses[v]:9.4f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(2, 3), help="both by default")
    parser.add_argument("--model", choices=("small", "llama-3.1-8b", "qwen2.5-7b"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--padding", type=int, default=0, help="tokens that all samples but the first lack")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the layers as model.compile does: the last one not, of `whole` and `released` neither",
    )
    parser.add_argument("--out", type=Path, help="a JSON file of all rounds")
    args = parser.parse_args()
    rows = [row for stage in ([args.stage] if args.stage else [2, 3]) for row in measure(stage, args)]
    if args.out:
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu {platform.machine()}"
        whole = [row for row in rows if row["variant"] == "whole"]
        values = {"device": device, "rows": [row for row in rows if row not in whole], "whole": whole}
        args.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
