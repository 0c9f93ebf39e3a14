"""The recipe's words on the method and its stages: what is trained, on which data, with which weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dpa_ray.recipe_sources import Section

Method = Literal["vanilla", "pmo", "cmo", "cal", "dpa"]
Weights = Literal["uniform", "prob", "logit"]

PROXY_METHODS = ("pmo", "dpa")
"""Methods whose stage 2 runs on the proxy LLM, and which therefore have a stage 1."""

METHOD_WEIGHTS: dict[str, Weights] = {
    "vanilla": "uniform", "pmo": "uniform", "cmo": "prob", "cal": "logit", "dpa": "prob",
}  # fmt: skip
"""Token weights of stages 2 and 3 by method (stage 1 is always uniform)."""

WEIGHT_BOUNDS: dict[Weights, tuple[float, float]] = {"uniform": (1.0, 1.0), "prob": (0.05, 0.5), "logit": (1.0, 5.0)}
"""Default clamp bounds: DPA's alpha and beta (arXiv 2509.14735), CAL's (arXiv 2405.17871)."""


def _bounds_of_weights(side: int) -> str:
    """The default lower (0) or upper (1) bounds, in words."""
    named = [(weights, bounds[side]) for weights, bounds in WEIGHT_BOUNDS.items() if weights != "uniform"]
    methods = {weights: ", ".join(m for m, own in METHOD_WEIGHTS.items() if own == weights) for weights, _ in named}
    return "; ".join(f"{bound:g} of {weights} weights ({methods[weights]})" for weights, bound in named)


BOUNDS_ORDER = "expected lower <= upper"
"""How both checks of the clamp bounds begin: a sweep leaves such points out."""


class CmoSection(Section):
    lower: float | None = Field(
        None, ge=0, description=f"least weight of a token before smoothing; null: {_bounds_of_weights(0)}"
    )
    upper: float | None = Field(
        None, gt=0, description=f"largest weight of a token before smoothing; null: {_bounds_of_weights(1)}"
    )
    window: int = Field(
        3, ge=1, description="odd: a weight is the mean over so many neighbouring targets of its turn; 1: none"
    )
    blind: Literal["auto", "cached", "live"] = Field(
        "auto",
        description="q of stages whose LLM is frozen, which stage 2's is and stage 3's may be: computed once and kept "
        "(cached, and auto where it can be), or at every step (live, and always where the LLM is trained)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> CmoSection:
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(f"{BOUNDS_ORDER}, found lower {self.lower} > upper {self.upper}")
        if self.window % 2 == 0:
            raise ValueError(f"expected an odd window (the token and as many on either side), found {self.window}")
        return self


class LoraSection(Section):
    rank: int = Field(256, gt=0, description="inner width of each of its pairs of matrices")
    alpha: float = Field(512, gt=0, description="what it adds is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into it, while it is trained")


LR = "peak learning rate of AdamW, after warm-up; 0: nothing is trained, only measured"
MAX_LENGTH = "tokens per sample, image tokens counted; what is beyond is cut"
WEIGHTS = "of the stage's tokens: uniform, prob (p - q) or logit (CAL's); null: as the method has them"
LORA = "of the LLM, where llm is lora"


class StageSection(Section):
    """What every stage has."""

    lr: float = Field(ge=0, description=LR)
    epochs: int = Field(1, gt=0, description="times that the data is gone through")
    global_batch_size: int = Field(256, gt=0, description="samples per optimizer step over all workers")
    micro_batch_size: int = Field(8, gt=0, description="samples per forward on one worker, at most")
    max_length: int = Field(8192, gt=1, description=MAX_LENGTH)
    max_steps: int | None = Field(None, gt=0, description="stop (and end the lr schedule) after so many steps")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW, both in [0, 1)")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    warmup_fraction: float = Field(
        0.03, ge=0, le=1, description="share of the steps in which lr rises; it then falls to 0 by half a cosine"
    )
    gradient_checkpointing: bool = Field(
        True,
        description="make the decoder's activations again in the backward pass: less memory, more time, same result",
    )

    @model_validator(mode="before")
    @classmethod
    def _betas_from_yaml(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = {**values, "betas": tuple(values["betas"])}
        return values

    @model_validator(mode="after")
    def _betas_in_range(self) -> StageSection:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"expected both betas in [0, 1), found {list(self.betas)}")
        return self


class ProxyLlmSection(StageSection):
    lr: float = Field(4.0e-5, ge=0, description=LR)
    packing: bool = Field(True, description="lay a micro-batch's samples into rows without padding; same result")
    llm: Literal["lora", "full"] = Field(
        "lora", description="what of the proxy is trained: a LoRA, or (for an ablation) the LLM in full"
    )
    lora: LoraSection = Field(default_factory=LoraSection, description=LORA)
    from_: str | None = Field(None, alias="from", description="PEFT adapter folder to take instead of training")


class ProxyMllmSection(StageSection):
    lr: float = Field(2.0e-3, ge=0, description=LR)
    weights: Weights | None = Field(None, description=WEIGHTS)
    from_: str | None = Field(
        None, alias="from", description="connector (safetensors folder or mm_projector.bin) to take"
    )


class InstructSection(StageSection):
    lr: float = Field(4.0e-5, ge=0, description=LR)
    max_length: int = Field(2048, gt=1, description=MAX_LENGTH)
    weights: Weights | None = Field(None, description=WEIGHTS)
    llm: Literal["full", "lora", "frozen"] = Field(
        "full", description="what of the LLM is trained beside the connector: all, a LoRA, or nothing"
    )
    group_by_length: bool = Field(
        True, description="steps all with or all without images where possible, passes of samples of like length"
    )
    lora: LoraSection = Field(default_factory=LoraSection, description=LORA)


class StagesSection(Section):
    proxy_llm: ProxyLlmSection = Field(
        default_factory=ProxyLlmSection, description="1, of dpa and pmo: the LLM learns the captions' style, as a proxy"
    )
    proxy_mllm: ProxyMllmSection = Field(
        default_factory=ProxyMllmSection,
        description="2: the connector, on the proxy (or the LLM itself), which is frozen",
    )
    instruct: InstructSection = Field(
        default_factory=InstructSection, description="3: the connector and the original LLM, on conversations"
    )
