"""How large are image tokens when stage 2 begins? Never smaller than words.

A decoder's first norm divides by the size of what it is given: with a new connector whose output is far below the word
embeddings, every small change of it is a large one behind that norm, and the gradient has a heavy tail (SmolLM2-135M
behind DINOv2-S: 0.043 against 0.136; up to 9,000 where 100 is usual). LLMs with smaller embeddings keep LLaVA's start.
What it is worth in a short stage is not settled: tests/benchmarks/connector_start.py sees no clear gain without a proxy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpa_ray.model.step import vision_features

STRIDE = 16
"""One word of so many is looked at."""


@torch.no_grad()
def match_embedding_scale(model: Any, pixels: Tensor) -> float:
    """Scale the connector's last layer up, so that its output for `pixels` has about the word embeddings' RMS or more.

    Args:
        model: as `vlm.assemble` gives it, its connector untrained. Random `pixels` do: a tower's features have the same
            size whatever the image (measured: 0.19 to 0.22 for noise, a flat image and photos).
        pixels: (N, 3, H, W), as the image processor makes them.
    Returns: the factor, 1 where nothing was changed.
    """
    connector = model.model.multi_modal_projector
    embedding = model.get_input_embeddings()
    some = torch.arange(0, embedding.num_embeddings, STRIDE).unsqueeze(0)
    # what the decoder is given, not what is stored: Gemma scales it in between
    words = embedding(some).float().square().mean().sqrt()
    features = vision_features(model, pixels.to(connector.linear_1.weight.dtype))
    images = connector(features).float().square().mean().sqrt()
    factor = float(f"{float(words / images):.2g}")  # two digits: ranks on unlike machines round elsewhere
    if not 1 < factor < torch.inf:
        return 1.0
    connector.linear_2.weight *= factor
    connector.linear_2.bias *= factor
    return factor
