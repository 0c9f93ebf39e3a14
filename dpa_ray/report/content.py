"""What does a report know of a run? Plain values, as the store has them; whoever makes the report gathers them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpa_ray.report.metrics import Record

STAGES = ("proxy_llm", "proxy_mllm", "instruct")
TITLES = {
    "proxy_llm": "Stage 1, proxy_llm: captions alone",
    "proxy_mllm": "Stage 2, proxy_mllm: image and caption",
    "instruct": "Stage 3, instruct: image and conversation",
}


@dataclass(frozen=True)
class Weighting:
    """How a stage weighs its targets: kind uniform | prob | logit, and its clamp."""

    kind: str
    lower: float
    upper: float


@dataclass(frozen=True)
class WordLosses:
    """The words of a stage with their losses before and after it."""

    samples: str  # held-out | training: what samples they are of
    num_samples: str
    rows: Sequence[Mapping[str, Any]]  # word, count, nll_before, nll_after, gain, visual: see engine/words.py
    digest: str = ""  # of the data that the samples are of


@dataclass(frozen=True)
class RunData:
    """One run."""

    name: str
    url: str  # of its folder
    info: Mapping[str, Any]  # run.json
    metrics: Sequence[Record] = ()  # metrics.jsonl
    recipe_text: str = ""  # the resolved recipe as YAML
    weightings: Mapping[str, Weighting] = field(default_factory=dict)  # by stage
    examples: Mapping[str, Sequence[Mapping[str, Any]]] = field(
        default_factory=dict
    )  # by stage, see engine/examples.py
    words: Mapping[str, WordLosses] = field(default_factory=dict)  # by stage
    answers: Sequence[Mapping[str, Any]] = ()  # answers.jsonl of its evaluation
    pictures: Mapping[tuple[str, int], Sequence[str]] = field(default_factory=dict)  # data URIs by (set, sample)
    unread: Sequence[str] = ()  # what of the above is left out because it could not be read, and why

    def of_stage(self, stage: str) -> list[Record]:
        """The metrics of one stage."""
        return [record for record in self.metrics if record["stage"] == stage]

    @property
    def stages(self) -> list[str]:
        """The stages that it has metrics of."""
        return [stage for stage in STAGES if any(record["stage"] == stage for record in self.metrics)]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """`value` where it is a finite number: what is read from a file may be anything."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def last_mean(records: Sequence[Record], key: str) -> float | None:
    """Mean of a metric over the last tenth of a stage's steps: single steps are noisy."""
    values = [v for record in records[-max(1, len(records) // 10) :] if (v := number(record.get(key))) is not None]
    return sum(values) / len(values) if values else None
