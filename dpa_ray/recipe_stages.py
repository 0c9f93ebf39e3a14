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

BOUNDS_ORDER = "expected lower <= upper"
"""How both checks of the clamp bounds begin: a sweep leaves such points out."""


class CmoSection(Section):
    lower: float | None = Field(None, ge=0)
    upper: float | None = Field(None, gt=0)
    window: int = Field(3, ge=1)
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
    rank: int = Field(256, gt=0)
    alpha: float = Field(512, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class StageSection(Section):
    """What every stage has."""

    lr: float = Field(ge=0)
    epochs: int = Field(1, gt=0)
    global_batch_size: int = Field(256, gt=0, description="samples per optimizer step over all workers")
    micro_batch_size: int = Field(8, gt=0, description="samples per forward on one worker, at most")
    max_length: int = Field(8192, gt=1, description="tokens per sample, image tokens counted")
    max_steps: int | None = Field(None, gt=0, description="stop (and end the lr schedule) after so many steps")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    gradient_checkpointing: bool = True

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
    lr: float = Field(4.0e-5, ge=0)
    packing: bool = Field(True, description="lay a micro-batch's samples into rows without padding; same result")
    llm: Literal["lora", "full"] = Field(
        "lora", description="what of the proxy is trained: a LoRA, or (for an ablation) the LLM in full"
    )
    lora: LoraSection = Field(default_factory=LoraSection)
    from_: str | None = Field(None, alias="from", description="PEFT adapter folder to take instead of training")


class ProxyMllmSection(StageSection):
    lr: float = Field(2.0e-3, ge=0)
    weights: Weights | None = None
    from_: str | None = Field(
        None, alias="from", description="connector (safetensors folder or mm_projector.bin) to take"
    )


class InstructSection(StageSection):
    lr: float = Field(4.0e-5, ge=0)
    max_length: int = Field(2048, gt=1)
    weights: Weights | None = None
    llm: Literal["full", "lora", "frozen"] = "full"
    group_by_length: bool = Field(
        True, description="steps all with or all without images where possible, passes of samples of like length"
    )
    lora: LoraSection = Field(default_factory=LoraSection)


class StagesSection(Section):
    proxy_llm: ProxyLlmSection = Field(default_factory=ProxyLlmSection)
    proxy_mllm: ProxyMllmSection = Field(default_factory=ProxyMllmSection)
    instruct: InstructSection = Field(default_factory=InstructSection)
