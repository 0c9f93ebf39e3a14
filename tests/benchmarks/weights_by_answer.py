"""Which targets do a method's weights leave aside: those that the model gets right, or those that it gets wrong?

    python -m tests.benchmarks.weights_by_answer runs/a runs/b --store dpa-store

For finished runs: the visual targets (by the built-in set's own truth) of samples that stage 3 was trained on, by the model that it
ended with. A target is right where its probability is above a half. Weights are those of `cmo` with the given bounds,
whatever the run's method was, so that methods can be compared. The image token's own row takes part in the softmax, as it does
not in training.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpa_ray.data.encode import Encoder
from dpa_ray.data.ingest import Loader
from dpa_ray.data.prepare import prepare
from dpa_ray.model import vlm
from dpa_ray.model.cmo import Weighting, raw_weights
from dpa_ray.model.export import load_exported
from dpa_ray.model.held_out import both_scores
from dpa_ray.model.step import StepModule
from dpa_ray.recipe import Recipe
from dpa_ray.store.fs import Store

BATCH = 32


@dataclass
class Group:
    """The right or the wrong targets of one run."""

    share: float  # of all visual targets
    weight: float  # mean
    at_lower: float  # fraction whose weight is the lower bound
    of_gradient: float  # share of the sum of weight times the gradient's size at the logits, 1 - p
    uniform: float  # the same with weights of 1


def look(store: Store, run: str, num_samples: int, weighting: Weighting) -> tuple[str, dict[str, Group]]:
    """Method and groups of a run."""
    info = json.loads((Path(store.url(run)) / "run.json").read_text())
    recipe = Recipe.model_validate(info["recipe"])
    model, processor = load_exported(Path(store.url(run)) / "model")
    encoder = Encoder(
        tokenizer=processor.tokenizer, template="chat", max_length=recipe.stages.instruct.max_length,
        num_image_tokens=model.config.image_seq_length, image_token_id=model.config.image_token_id, template_date=None,
    )  # fmt: skip
    loader = Loader(
        store=store, prepared=prepare(store, recipe.data.instruct, max_quarantined_fraction=0), encoder=encoder,
        image_processor=processor.image_processor, pad_token_id=0, can_skip=False,
    )  # fmt: skip
    module = StepModule(model, weighting, softcap=vlm.softcap_of(model.config.text_config), num_softmax_rows=None)
    p, weight = [], []
    rows = np.linspace(0, loader.prepared.num_rows - 1, num_samples).astype(int)
    for batch in (loader.load(some, 0).to("cpu") for some in np.array_split(rows, -(-num_samples // BATCH))):
        found = both_scores(module, batch)
        visual = batch.grounded[found.row, found.column]
        p.append(found.seen.log_prob[visual].exp())
        weight.append(raw_weights(found.seen, found.blind, found.has_blind, weighting)[visual])
    at_lower_N = torch.cat(weight) <= weighting.lower
    p_N, weight_N = torch.cat(p).double(), torch.cat(weight).double()
    pull = weight_N * (1 - p_N)
    right = p_N > 0.5
    groups = {
        name: Group(
            float(mine.double().mean()), float(weight_N[mine].mean()), float(at_lower_N[mine].double().mean()),
            float(pull[mine].sum() / pull.sum()), float((1 - p_N)[mine].sum() / (1 - p_N).sum()),
        )
        for name, mine in (("right", right), ("wrong", ~right))
    }  # fmt: skip
    return info["method"], groups


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="runs/NAME in the store")
    parser.add_argument("--store", required=True, help="a folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--lower", type=float, default=0.05)
    parser.add_argument("--upper", type=float, default=0.5)
    options = parser.parse_args()
    weighting = Weighting("prob", options.lower, options.upper, 1)
    print(
        f"{'run':28}{'method':9}{'answer':7}{'share':>7}{'weight':>8}{'at lower':>10}{'of gradient':>13}{'if uniform':>12}"
    )
    for run in options.runs:
        method, groups = look(Store(options.store), run, options.samples, weighting)
        for name, g in groups.items():
            print(
                f"{run.removeprefix('runs/'):28}{method:9}{name:7}{g.share:7.2f}{g.weight:8.3f}{g.at_lower:10.2f}"
                f"{g.of_gradient:13.2f}{g.uniform:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
