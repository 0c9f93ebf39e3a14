"""What a step's loss must be: DPA by transformers alone, one sample at a time, written from the method's formulas.

Nothing here is shared with dpa_ray. A sample runs alone and unpadded, logits are full, probabilities float64, and the blind
pass is the *masked* form: the sequence with its image tokens in place, at their positions, hidden as attention keys
(arXiv 2509.14735 and its released code). Weights are computed by loops over single numbers.

    p_j = P(s_j | V, s_<j)     q_j = P(s_j | s_<j)     w_j = mean over {j-1, j, j+1} of clamp(p_j - q_j, lower, upper)
    loss = sum_j w_j (-log p_j) / sum_j w_j over all samples of the optimizer step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.parity.encoding import Tokens, encode, preprocess


@dataclass
class Setup:
    """One stage as the method describes it, with the weights it runs on (which lr 0 leaves as they are)."""

    stage: str  # proxy_llm | proxy_mllm | instruct
    llm: Path  # base LLM folder
    images: Path  # folder that image names are relative to
    max_length: int
    adapter: Path | None = None  # PEFT folder, merged into the LLM: stage 2 of a method with a proxy, and nowhere else
    tower: Path | None = None
    vision_layer: int = -2
    connector: Path | None = None
    weights: str = "uniform"  # uniform | prob | logit
    bounds: tuple[float, float] = (0.05, 0.5)
    window: int = 3
    aspect: str = "crop"  # crop | pad | stretch
    image_size: int | None = None
    template_date: str = "26 Jul 2024"


@dataclass
class Step:
    """The logged numbers of one optimizer step, and what they are made of."""

    loss: float
    nll_mean: float
    weight_mean: float
    num_targets: int
    num_tokens: int
    weights: list[float] = field(default_factory=list)  # of every target token, in order
    unclamped: list[float] = field(default_factory=list)  # p - q (or the logits' difference) before clamp and window


class Reference:
    """Computes the steps of one stage. Models are loaded once, in float32, with plain (eager) attention."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.tokenizer = AutoTokenizer.from_pretrained(setup.llm)
        llm: Any = AutoModelForCausalLM.from_pretrained(setup.llm, dtype=torch.float32, attn_implementation="eager")
        if setup.adapter is not None:
            llm = PeftModel.from_pretrained(llm, str(setup.adapter)).merge_and_unload()
        self.llm = llm.eval()
        if setup.stage != "proxy_llm":
            assert setup.tower is not None
            assert setup.connector is not None
            tower: Any = AutoModel.from_pretrained(setup.tower, dtype=torch.float32, attn_implementation="eager")
            self.tower = getattr(tower, "vision_model", tower).eval()  # CLIP and SigLIP folders hold a text tower too
            self.has_cls = tower.config.model_type != "siglip"
            self.connector = load_file(str(setup.connector))
            self.processor = AutoImageProcessor.from_pretrained(setup.tower).to_dict()

    def step(self, samples: Sequence[dict[str, Any]]) -> Step:
        """The numbers of the optimizer step that takes `samples` (LLaVA records)."""
        nll: list[float] = []
        weights: list[float] = []
        unclamped: list[float] = []
        num_tokens = 0
        for sample in samples:
            features = self.features(sample)
            encoded = self.encode(sample, num_image_tokens=features.shape[1] if len(features) else 0)
            num_tokens += len(encoded.ids)
            difference, nlls = self.differences(encoded, features)
            nll += nlls
            unclamped += difference
            weights += token_weights(difference, encoded.turn_of_targets(), self.setup)
        total = sum(weights)
        return Step(
            loss=sum(w * n for w, n in zip(weights, nll, strict=True)) / total if total else 0.0,
            nll_mean=sum(nll) / max(len(nll), 1),
            weight_mean=total / max(len(nll), 1),
            num_targets=len(nll),
            num_tokens=num_tokens,
            weights=weights,
            unclamped=unclamped,
        )

    def encode(self, sample: dict[str, Any], num_image_tokens: int) -> Tokens:
        """The sample's token ids and targets under the stage's template."""
        template = {"proxy_llm": "text", "proxy_mllm": "plain", "instruct": "chat"}[self.setup.stage]
        return encode(
            self.tokenizer, sample, template, num_image_tokens, self.setup.max_length, self.setup.template_date
        )

    @torch.no_grad()
    def features(self, sample: dict[str, Any]) -> torch.Tensor:
        """(I, P, D) float32 image features behind the connector: Linear, GELU, Linear on one hidden state, CLS dropped."""
        names = sample.get("image", [])
        names = [names] if isinstance(names, str) else names
        if self.setup.stage == "proxy_llm" or not names:
            return torch.zeros(0, 0, 0)
        setup = self.setup
        pixels = [preprocess(setup.images / n, setup.aspect, self.processor, setup.image_size) for n in names]
        inputs = torch.from_numpy(np.stack(pixels)).float()
        hidden = self.tower(pixel_values=inputs, output_hidden_states=True).hidden_states[setup.vision_layer]
        if self.has_cls:
            hidden = hidden[:, 1:]
        c = self.connector
        inner = torch.nn.functional.gelu(hidden @ c["linear_1.weight"].T + c["linear_1.bias"])
        return inner @ c["linear_2.weight"].T + c["linear_2.bias"]

    @torch.no_grad()
    def logits(self, encoded: Tokens, features: torch.Tensor, *, blind: bool) -> torch.Tensor:
        """(T, V) logits over the base vocabulary, the model's own soft-capping included; `blind` hides the image keys."""
        ids = torch.tensor([encoded.ids])
        is_image = ids < 0
        embeds = self.llm.get_input_embeddings()(ids.clamp(min=0))
        if is_image.any():
            embeds[is_image] = features.flatten(0, 1)
        attention = torch.where(is_image, 0, 1) if blind else torch.ones_like(ids)
        positions = torch.arange(ids.shape[1])[None]
        out = self.llm(inputs_embeds=embeds, attention_mask=attention, position_ids=positions, use_cache=False)
        return out.logits[0].double()

    def differences(self, encoded: Tokens, features: torch.Tensor) -> tuple[list[float], list[float]]:
        """What the weights clamp, and -log p, for every target in order."""
        seeing = self.logits(encoded, features, blind=False)
        log_p = seeing.log_softmax(-1)
        kind = self.setup.weights
        blind = self.logits(encoded, features, blind=True) if kind != "uniform" else seeing
        blind_log_q = blind.log_softmax(-1)
        difference, nll = [], []
        for j in encoded.targets:
            token = encoded.ids[j]
            nll.append(-log_p[j - 1, token].item())
            reader = j - 1  # q_j is read at the last *text* token before j
            while reader >= 0 and encoded.ids[reader] < 0:
                reader -= 1
            p = log_p[j - 1, token].exp().item()
            q = blind_log_q[reader, token].exp().item() if reader >= 0 else 0.0
            if kind == "prob":
                difference.append(p - q)
            elif kind == "logit":
                no_reader = self.setup.bounds[0]
                gap = (seeing[j - 1, token] - blind[reader, token]).item() if reader >= 0 else no_reader
                difference.append(gap)
            else:
                difference.append(1.0)
        return difference, nll


def token_weights(difference: Sequence[float], turns: Sequence[int], setup: Setup) -> list[float]:
    """Clamp, then the mean over the window; a window stays in its turn and is shorter at the turn's edges."""
    if setup.weights == "uniform":
        return [1.0] * len(difference)
    lower, upper = setup.bounds
    clamped = [min(max(d, lower), upper) for d in difference]
    reach = setup.window // 2
    smoothed = []
    for j in range(len(clamped)):
        near = [clamped[k] for k in range(j - reach, j + reach + 1) if 0 <= k < len(clamped) and turns[k] == turns[j]]
        smoothed.append(sum(near) / len(near))
    return smoothed
