"""How long would the stages take, and how many bytes would they write? Assumptions are said with the numbers."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.doctor.memory import Counts
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.report.metrics import FILE as METRICS
from dpa_ray.stages.runs import RUN_FILE
from dpa_ray.store.fs import Store

MAX_RUNS = 20
"""Earlier runs looked into for a step time."""

WARM_UP_STEPS = 3
"""First steps of a stage that its step time is not taken from, where there are others."""

STATE_BYTES = 12
"""Of a checkpoint for each trained parameter: fp32 master and AdamW's two moments."""


@dataclass(frozen=True)
class StepTime:
    """Of one stage."""

    time_s: float
    origin: str  # in words


def earlier_step_times(store: Store, recipe: Recipe, stages: tuple[str, ...]) -> dict[str, StepTime]:
    """Median step times out of this run's own metrics, else those of other runs whose stage computes the same."""
    names = [recipe.name, *(name for name in store.list_dirs("runs") if name != recipe.name)]
    found: dict[str, StepTime] = {}
    for name in names[:MAX_RUNS]:
        wanted = [stage for stage in stages if stage not in found]
        if not wanted:
            break
        try:
            values = store.read_json(f"runs/{name}/{RUN_FILE}")["recipe"]
            lines = store.read_bytes(f"runs/{name}/{METRICS}").decode().splitlines()
            records = [json.loads(line) for line in lines if line.endswith("}")]
        except (FileNotFoundError, UserError, ValueError, KeyError, TypeError):
            continue  # a run that never came so far
        for stage in wanted:
            if _computes_the_same(recipe.to_dict(), values, stage):
                times = [r["step_time_s"] for r in records if r.get("stage") == stage and r.get("step_time_s")]
                if times := times[WARM_UP_STEPS:] or times:
                    found[stage] = StepTime(statistics.median(times), f"median of {len(times)} steps of the run {name}")
    return found


def _computes_the_same(mine: dict[str, Any], other: dict[str, Any], stage: str) -> bool:
    """On as many workers, a step of the same model, samples and way of computing."""
    keys = ("global_batch_size", "micro_batch_size", "max_length", "gradient_checkpointing", "llm", "lora")

    def of(values: dict[str, Any]) -> Any:
        section, cluster = values["stages"][stage], values["cluster"]
        return [values["model"], values["precision"], values["engine"], values["deepspeed"],
                [section.get(key) for key in keys], cluster["workers"], cluster["gpus_per_worker"]]  # fmt: skip

    try:
        return bool(of(mine) == of(other))
    except (KeyError, TypeError):
        return False


def given_step_times(texts: list[str], stages: tuple[str, ...]) -> dict[str, StepTime]:
    """From `SECONDS` (of all stages) or `STAGE=SECONDS`. Raises: ValueError."""
    found: dict[str, StepTime] = {}
    for text in texts:
        stage, equals, number = text.rpartition("=")
        try:
            time_s = float(number)
        except ValueError:
            time_s = math.nan
        if not (0 < time_s < math.inf) or (equals and stage not in stages):
            raise ValueError(
                f"--step-time: expected SECONDS or STAGE=SECONDS with one of {', '.join(stages)}, found {text!r}"
            )
        found |= {name: StepTime(time_s, "given") for name in ([stage] if equals else stages)}
    return found


def written_bytes(recipe: Recipe, counts: Mapping[str, Counts], llm: int, data: int) -> dict[str, int]:
    """What a whole run puts into the store, by kind.

    Args:
        counts: by training stage.
        llm: parameters of the LLM.
        data: bytes of the shards that are not there yet.
    """
    item = 2 if recipe.precision == "bf16" else 4
    whole = max((c.whole for c in counts.values()), default=0)
    written = {"data": data}
    if "proxy_llm" in counts:
        written["proxy-llm"] = counts["proxy_llm"].trained * item
    if recipe.method in PROXY_METHODS and "proxy_mllm" in counts:
        written["proxy-merged"] = llm * item
    if "proxy_mllm" in counts:
        written["proxy-mllm"] = counts["proxy_mllm"].trained * item
    if "instruct" in counts:
        written["instruct"] = whole * item
        if recipe.store.startswith(("s3://", "gs://")):  # on a disk, runs/<name>/model is links
            written["model"] = whole * item
    # one more than are kept: the old ones go when the new one is whole
    largest = max((c.trained for c in counts.values()), default=0)
    written["checkpoints at once"] = (recipe.checkpoint.keep + 1) * STATE_BYTES * largest
    return written


def may_reuse(store: Store) -> bool:
    """Is there anything in the store that a run could take instead of making it, or go on from?"""
    return any(store.list_dirs(folder) for folder in ("artifacts", "checkpoints"))


def free_bytes(store: Store) -> int | None:
    """Of a local store's disk; None for S3."""
    if not store.is_local:
        return None
    folder = Path(store.uri)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free
