"""Do batches with no image or no target, ranks with nothing to do and long runs go through, with flat memory?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import tiny_models
from tests.integration.runs import STAGES, Run, losses, make_recipe, run_dpa
from tests.tiny_models import LlavaData

TIMEOUT_S = 300
"""A rank that waits for another would wait for ever: this is what a hang costs."""


@pytest.fixture(scope="module")
def odd(assets_dir: Path) -> tuple[LlavaData, LlavaData]:
    """Half the samples text-only; of the conversations a third besides has no target within 150 tokens."""
    folder = assets_dir / "odd"
    text_only = tuple(range(0, 12, 2))
    return (
        tiny_models.make_captions(folder / "captions", 12, text_only=text_only, seed=8),
        tiny_models.make_conversations(
            folder / "conversations", 12, text_only=text_only, no_target=(1, 4, 5, 8), seed=9
        ),
    )


def train(odd: tuple[LlavaData, LlavaData], llm: Path, tower: Path, store: Path, **changes: Any) -> Run:
    recipe = make_recipe(llm, tower, *odd, method="dpa", cluster__workers=2, **changes)
    for stage in STAGES:
        recipe["stages"][stage] |= {"lr": 1.0e-3, "micro_batch_size": 1}
    return run_dpa(recipe, store, "odd", timeout_s=TIMEOUT_S)


def check_odd(run: Run, odd: tuple[LlavaData, LlavaData], *, num_steps: int, global_batch_size: int) -> None:
    """All steps were made, all odd cases met, and nothing became NaN."""
    assert run.returncode == 0, run.output
    for stage in STAGES:
        lines = run.metrics(stage)
        assert len(lines) == num_steps, stage
        for key in ("loss", "nll_mean", "weight_mean", "grad_norm"):
            assert all(line[key] is None or np.isfinite(line[key]) for line in lines), f"{stage}: {key}"
    if global_batch_size == 1:  # else a rank's batches are odd, if not a whole step's
        assert 0 in losses(run, "instruct", "num_targets"), "a step without any target was met"
        images = ["image" in odd[1].samples[i] for (i,) in run.samples("instruct").values()]
        assert set(images) == {True, False}, "steps without any image were met"
    model = AutoModelForImageTextToText.from_pretrained(run.model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.ci
def test_no_image_no_target_and_an_idle_rank(
    odd: tuple[LlavaData, LlavaData], tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable
) -> None:
    """A global batch of 1 on two workers: one of them has only filler, and single samples make whole steps."""
    sizes = {f"stages__{stage}__global_batch_size": 1 for stage in STAGES}
    run = train(odd, tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip"), tmp_path / "store", **sizes)
    check_odd(run, odd, num_steps=12, global_batch_size=1)
    without = [line for line in run.metrics("instruct") if line["num_targets"] == 0]
    assert all(not line["grad_norm"] for line in without), "a step whose weights sum to 0 makes no update"


@pytest.mark.full
@pytest.mark.parametrize("engine", ["torch", "zero0", "zero3"])
@pytest.mark.parametrize("global_batch_size", [1, 2, 3])
def test_odd_batches_on_every_engine(
    engine: str, global_batch_size: int, odd: tuple[LlavaData, LlavaData], tmp_path: Path,
    tiny_llm: Callable, tiny_tower: Callable,
) -> None:  # fmt: skip
    changes: dict[str, Any] = {f"stages__{stage}__global_batch_size": global_batch_size for stage in STAGES}
    changes |= {"engine": "torch"} if engine == "torch" else {"deepspeed__zero_stage": int(engine[-1])}
    run = train(odd, tiny_llm("qwen2", bos=False), tiny_tower("dinov2"), tmp_path / "store", **changes)
    check_odd(run, odd, num_steps=12 // global_batch_size, global_batch_size=global_batch_size)


@pytest.mark.full
def test_data_without_a_single_image(tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable) -> None:
    """Every weight is the lower bound then: p = q."""
    everything = tuple(range(12))
    data = (
        tiny_models.make_captions(tmp_path / "captions", 12, text_only=everything),
        tiny_models.make_conversations(tmp_path / "conversations", 12, text_only=everything),
    )
    run = train(data, tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip"), tmp_path / "store")
    assert run.returncode == 0, run.output
    for stage in ("proxy_mllm", "instruct"):
        assert losses(run, stage, "weight_mean") == pytest.approx([0.05] * 3, rel=1e-3)
        assert losses(run, stage) == pytest.approx(losses(run, stage, "nll_mean"), rel=1e-3)


class MemoryWatch:
    """Samples the resident memory of this process's descendants that train, by process id, while it is open."""

    def __init__(self) -> None:
        self.mib: dict[int, list[float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            for pid, mib in _descendants_mib(os.getpid()).items():
                self.mib.setdefault(pid, []).append(mib)
            time.sleep(0.25)


def _descendants_mib(root: int) -> dict[int, float]:
    """Resident MiB by process id of every Ray Train worker below `root` (Linux's /proc; Ray names its workers)."""
    parents, names, sizes = {}, {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat[1])
        sizes[int(folder.name)] = int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    found = {}
    for pid in parents:
        above = pid
        while above not in (0, 1, root):
            above = parents.get(above, 0)
        if above == root and "RayTrainWorker" in names[pid]:
            found[pid] = sizes[pid]
    return found


@pytest.mark.full
def test_memory_stays_flat_over_steps(tmp_path: Path, tiny_llm: Callable, tiny_tower: Callable) -> None:
    """300 steps of stage 3 over texts of changing length: the second half's peak is the first half's, within 3 %.

    A leak of one logits tensor a step (40 x 374 floats, 60 KB) or of a graph would add 10 MB and more.
    """
    data = (
        tiny_models.make_captions(tmp_path / "captions", 16),
        tiny_models.make_conversations(tmp_path / "conversations", 64, text_only=(1, 2), several_images=(3,)),
    )
    recipe = make_recipe(tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip"), *data, method="cmo")
    recipe["stages"]["instruct"] |= {"lr": 1.0e-4, "epochs": 20, "max_steps": 300}
    with MemoryWatch() as watch:
        run = run_dpa(recipe, tmp_path / "store", "long", timeout_s=TIMEOUT_S)
    assert run.returncode == 0, run.output
    times = np.cumsum(losses(run, "instruct", "step_time_s"))
    longest = max(watch.mib.values(), key=len)
    steps = longest[-max(8, int(times[-1] / 0.25)) :]  # samples of the last stage, which the worker ends with
    middle = len(steps) // 2
    assert len(steps) >= 8, "too short to say anything"
    assert max(steps[middle:]) <= 1.03 * max(steps[: middle + 1]), [round(m) for m in steps]
