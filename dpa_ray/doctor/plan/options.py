"""What is a plan told besides the recipe? GPUs, step times, data, hardware; every default is an assumption that is printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L4": 121.0, "L40S": 362.0, "A10G": 70.0}
"""Dense bf16 of a GPU by Ray's accelerator type, as its maker states it (SXM where there are several)."""

MAX_GPUS = 1 << 20
BYTES_PER_S = 1e9
DEFAULT_GPUS = "1-1024"


@dataclass(frozen=True)
class Given:
    """A step time that was measured elsewhere."""

    time_s: float
    num_gpus: int


@dataclass(frozen=True)
class PlanOptions:
    """Rates are bytes per second of one GPU's network and of the store; latency is one small call of the store."""

    gpus: tuple[int, ...]
    step_times: dict[str, Given] = field(default_factory=dict)
    from_run: str = ""
    samples: dict[str, int] = field(default_factory=dict)
    tokens_per_sample: dict[str, float] = field(default_factory=dict)
    bytes_per_sample: float = 0.0  # 0: as in the data
    gpu: str = ""
    peak_flops: float = 0.0  # 0: not told
    mfu: float = 0.4
    gpus_per_node: int = 8
    network_bytes_per_s: float = 50 * BYTES_PER_S
    store_bytes_per_s: float = 25 * BYTES_PER_S
    store_latency_s: float = 0.03


def gpu_list(text: str) -> tuple[int, ...]:
    """`1,8,64` or `1-1024` (doubling). Raises: ValueError."""
    try:
        if "-" in text:
            first, last = (int(part) for part in text.split("-"))
            if not 0 < first <= last:
                raise ValueError
            doubling = [first << n for n in range((last // first).bit_length())]
            numbers = [*doubling, *([last] if doubling[-1] != last else [])]
        else:
            numbers = sorted({int(part) for part in text.split(",")})
        if not all(0 < n <= MAX_GPUS for n in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--gpus: expected numbers such as 1,8,64 or a range 1-1024 (doubling), found {text!r}"
        ) from None
    return tuple(numbers)


def per_stage(option: str, texts: Sequence[str], stages: Sequence[str]) -> dict[str, float]:
    """Of `NUMBER` (for all stages) or `STAGE=NUMBER`, later ones over earlier ones. Raises: ValueError."""
    found: dict[str, float] = {}
    for text in texts:
        stage, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or (equals and stage not in stages):
            raise ValueError(
                f"{option}: expected NUMBER or STAGE=NUMBER with one of {', '.join(stages)}, found {text!r}"
            )
        found |= dict.fromkeys([stage] if equals else stages, value)
    return found


def whole_per_stage(option: str, texts: Sequence[str], stages: Sequence[str]) -> dict[str, int]:
    """The same of whole numbers. Raises: ValueError."""
    found = per_stage(option, texts, stages)
    for stage, value in found.items():
        if value != int(value):
            raise ValueError(f"{option}: expected a whole number for {stage}, found {value:g}")
    return {stage: int(value) for stage, value in found.items()}


def step_times(texts: Sequence[str], stages: Sequence[str]) -> dict[str, Given]:
    """Of `[STAGE=]SECONDS@GPUS`. Raises: ValueError."""
    found: dict[str, Given] = {}
    for text in texts:
        seconds, at, gpus = text.rpartition("@")
        if not at or not gpus.isascii() or not gpus.isdigit() or not 0 < int(gpus) <= MAX_GPUS:
            raise ValueError(
                f"--step-time: a plan expects [STAGE=]SECONDS@GPUS, the number of GPUs that it was measured on, found {text!r}"
            )
        found |= {stage: Given(s, int(gpus)) for stage, s in per_stage("--step-time", [seconds], stages).items()}
    return found


def peak_flops(gpu: str, tflops: float) -> float:
    """Of one GPU, 0 where neither is told. Raises: ValueError where `gpu` is none that is known."""
    if tflops:
        return tflops * 1e12
    if gpu and gpu not in PEAK_TFLOPS:
        raise ValueError(
            f"--gpu: expected one of {', '.join(PEAK_TFLOPS)}, found {gpu!r}; or give its peak as --peak-tflops"
        )
    return PEAK_TFLOPS[gpu] * 1e12 if gpu else 0.0
