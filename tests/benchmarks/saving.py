"""What does a checkpoint cost the training that goes on beside it?

    OMP_WAIT_POLICY=passive python -m tests.benchmarks.saving

One process with PlainEngine trains stage 3 of the 8-layer model of cmo_step (all parameters; AdamW's moments are saved too) into
a folder, or into `--store`. A stretch of steps in which one checkpoint is copied, written, digested and uploaded is timed against one
without, interleaved: the difference is what a checkpoint costs, the copy that training waits for and the processor that the writing
takes from it. Divided by `checkpoint.every_s` it is its share of the run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dpa_ray.data.cursor import Cursor
from dpa_ray.engine.checkpointing import Checkpointer
from dpa_ray.engine.logs import Before, Recorder
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.protocol import OptimizerSettings
from dpa_ray.model.step import StepModule
from dpa_ray.recipe import load
from dpa_ray.store.fs import Store
from tests.benchmarks.cmo_step import CPU_MICRO_BATCH, UNIFORM, make_batch, make_model

CPU = torch.device("cpu")


class Stage:
    """A stage that saves when it is told."""

    def __init__(self, store: Store):
        recipe = load("tiny", ["checkpoint.keep=1"])
        result = SimpleNamespace(stage="instruct", key="abc")
        task: Any = SimpleNamespace(
            stage="instruct", recipe=recipe, result=result, run_path="runs/a", num_steps=10**6,
            data=SimpleNamespace(digest="d"), skipped=(),
        )  # fmt: skip
        model = make_model("small", 3, "cpu")
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.engine = PlainEngine(
            StepModule(model, UNIFORM, softcap=None, num_softmax_rows=None),
            OptimizerSettings((0.9, 0.999), 0.0, 1.0),
            CPU,
        )
        cursor = Cursor([40], seed=0, global_batch_size=8, window=40)
        self.recorder = Recorder(store, task, cursor, lambda *_, **__: None, Before(), 0.0)
        self.due = False
        self.saved: list[int] = []
        self.saver = Checkpointer(
            store, task, self.engine, self.recorder, CPU, note=print, saved=self.saved.append, drained=lambda: None
        )
        self.batch = make_batch(3, CPU_MICRO_BATCH, model.config.text_config.vocab_size, "cpu")
        self.number = 0

    def step(self, *, save: bool) -> None:
        self.number += 1
        sums = self.engine.forward(self.batch)
        self.engine.backward(sums.loss, last=True)
        self.engine.update(float(sums.weight), 1e-5)
        self.saver.after(self.number, [float(save), *self.saver.votes()[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a stretch: longer than a checkpoint takes")
    parser.add_argument("--store", help="default: a folder that is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Store(options.store or str(Path(folder) / "store")))
        stage.step(save=False)
        extra, waited, plain = [], [], []
        for _ in range(options.rounds):
            took = []
            for saves in (False, True):
                stood, begun = stage.recorder.saving_s, time.perf_counter()
                for number in range(options.steps):
                    stage.step(save=saves and number == 0)
                took.append(time.perf_counter() - begun)
                if saves:
                    waited.append(stage.recorder.saving_s - stood)
                    late = time.perf_counter()
                    stage.saver.close()  # what the stretch was too short for
                    took[-1] += time.perf_counter() - late
            plain.append(took[0])
            extra.append(took[1] - took[0])
        assert len(stage.saved) == options.rounds, stage.saved
    every_s = load("tiny", []).checkpoint.every_s
    assert every_s is not None
    cost = statistics.median(extra)
    print(
        f"{stage.num_parameters / 1e6:.0f} million parameters with moments, {12 * stage.num_parameters / 1e9:.2f} GB in fp32, "
        f"{os.cpu_count()} cores, medians of {options.rounds} rounds of {options.steps} steps"
    )
    print(f"steps alone          {statistics.median(plain):8.2f} s")
    print(
        f"with a checkpoint    {cost:+8.2f} s, of which training waits {statistics.median(waited):.2f} s for the copy"
    )
    print(f"every {every_s:g} s          {cost / every_s:8.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
