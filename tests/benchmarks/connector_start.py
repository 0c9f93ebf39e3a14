"""Does a short stage 2 learn more surely where a new connector's output is as large as words? Without Ray, real weights.

For each seed, 15 steps of 8 stamps captions with SmolLM2-135M (base: no proxy, token weights 1) behind DINOv2-S at 112 px,
from LLaVA's start and from model/connector_scale.py's, on the same samples. What is compared is the sum of the first
three steps' nll with that of the last three, and the largest gradient norm. Weights and images are those of the tests.

    python -m tests.benchmarks.connector_start --seeds 8
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from dpa_ray.data.cursor import Cursor
from dpa_ray.data.encode import Encoder
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model import vlm
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.connector_scale import match_embedding_scale
from dpa_ray.model.image_row import add_image_token, load_tokenizer
from dpa_ray.model.step import StepModule
from dpa_ray.model.tower import image_processor, tower_spec
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
from tests import real_assets

SIZE, LAYER, STEPS, BATCH = 112, -4, 15, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    real = real_assets.ensure()
    llm_ref, tower_ref = vlm.ModelRef(str(real.smollm2)), vlm.ModelRef(str(real.dinov2))
    tokenizer, row = add_image_token(load_tokenizer(llm_ref), vlm.load_llm_config(llm_ref).vocab_size)
    llm = vlm.load_llm(llm_ref, torch.float32)
    vlm.append_image_row(llm, row)
    tower, spec = vlm.load_tower(tower_ref, torch.float32), tower_spec(tower_ref, LAYER, SIZE)
    encoder = Encoder(tokenizer, "plain", 256, spec.num_image_tokens, row.token_id)
    print("seed  start     nll of the first and last three   largest gradient norm")
    with tempfile.TemporaryDirectory() as folder:
        source = SourceSection(
            source=str(real.stamps / "captions.json"), images=str(real.stamps / "images"), format="llava"
        )
        store = Store(folder)
        prepared = prepare(store, source, max_quarantined_fraction=0, report=lambda _: None)
        loader = Loader(store, prepared, encoder, image_processor(tower_ref, spec, "crop"), tokenizer.pad_token_id or 0)
        fell = {"llava": 0, "matched": 0}
        for seed in range(args.seeds):
            for start in fell:
                model = vlm.assemble(llm, tower, spec, row, dtype=torch.float32, seed=seed)
                if start == "matched":
                    match_embedding_scale(
                        model, torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
                    )
                lines = steps(model, row, loader, seed, args.lr)
                nll = [line["nll_mean"] for line in lines]
                first, last = sum(nll[:3]), sum(nll[-3:])
                fell[start] += last < first
                worst = max(line["grad_norm"] for line in lines)
                print(f"{seed:4}  {start:8} {first:10.2f} -> {last:6.2f} {worst:26.0f}", flush=True)
    print(", ".join(f"{start}: fell in {count} of {args.seeds}" for start, count in fell.items()))


def steps(model: Any, row: Any, loader: Loader, seed: int, lr: float) -> list[dict[str, Any]]:
    """The metrics of each step of one training."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    module = StepModule(model, Weighting("uniform", 1.0, 1.0, 3), softcap=None, num_softmax_rows=row.num_softmax_rows)
    engine = PlainEngine(module, OptimizerSettings((0.9, 0.999), 0.0, 1.0), torch.device("cpu"))
    cursor = Cursor(loader.prepared.row_groups, seed=seed, global_batch_size=BATCH, window=8192)
    plan = Plan(cursor, STEPS, 0, 1, BATCH)
    batches = (loader.load(rows, filler) for rows, filler in plan)
    lines: list[dict[str, Any]] = []
    train(
        engine, batches, plan, Schedule(STEPS, lr, 0.03), stage="proxy_mllm", device=torch.device("cpu"),
        record=lambda line, _: lines.append(line),
    )  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
