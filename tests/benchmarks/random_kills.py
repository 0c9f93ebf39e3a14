"""What does a run look like that is killed again and again, at times that nobody chose?

    pip install -e '.[test]' && python -m tests.benchmarks.random_kills --kills 50 --out kills.json

Tiny models on two local workers (ZeRO-2, dropout in stage 1), 150 steps a stage, `checkpoint.every_steps: 2`. Some runs
share the kills, all by SIGKILL: one worker, both, or everything (the job, its workers and all of Ray, after which the same
command is given again), each once the run has told of a step drawn evenly from all three stages', after a time drawn anew.
Each run must end with the weights, losses and samples of one that nobody disturbed, to the last bit; a kill after a
committed checkpoint must be gone on from that one or a later one, and repeat at most two steps that people were told of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.integration.runs import STAGES, Run, Running, losses, make_recipe, start_dpa

NUM_STEPS = 150
EVERY_STEPS = 2
KINDS = ("worker", "workers", "everything")
DELAY_S = (0.0, 2.0)
"""From the drawn step to the kill: several steps, so that it falls anywhere between two checkpoints."""


@dataclass
class Kill:
    """One kill, and what came of it. Steps count from 1 within their stage; 0: none."""

    run: int
    kind: str
    after_s: float
    stage: str  # under way, or "" between two
    told: int  # the last step in metrics.jsonl
    saved: int  # the last step with a committed checkpoint
    resumed_from: int | None = None  # None: from the stage's start, or the run was killed again before it told


def recipe(folder: Path) -> dict[str, Any]:
    """All stages train; folders of models and data are made in `folder`."""
    captions = tiny_models.make_captions(folder / "captions", 45, text_only=(4, 20), seed=5)
    talks = tiny_models.make_conversations(folder / "talks", 45, text_only=(7, 30), several_images=(3,), seed=6)
    made = make_recipe(
        tiny_models.make_llm(folder / "llm", "llama", bos=True), tiny_models.make_tower(folder / "tower", "clip"),
        captions, talks, checkpoint__every_steps=EVERY_STEPS, cluster__workers=2, cluster__max_failures=100,
        stages__proxy_llm__lora__dropout=0.1,
    )  # fmt: skip
    for stage, lr in zip(STAGES, (2.0e-3, 2.0e-3, 5.0e-4), strict=True):
        made["stages"][stage] |= {"lr": lr, "global_batch_size": 8, "epochs": 100, "max_steps": NUM_STEPS}
    return made


def result(run: Run) -> dict[str, Any]:
    """What must not change: SHA-256 of each stage's weights, losses, and samples by step."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        files = sorted(run.artifact(stage).glob("*.safetensors"))
        digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        steps = [line["step"] for line in run.metrics(stage)]
        found[stage] = (digest, steps, losses(run, stage), losses(run, stage, "grad_norm"), run.samples(stage))
    return found


def killed_run(
    number: int, num_kills: int, made: dict[str, Any], folder: Path, rng: random.Random
) -> tuple[Run, list[Kill]]:
    """A run to its end, with up to `num_kills` kills on the way."""
    kills: list[Kill] = []
    told: list[str] = []  # what each attempt printed
    store = folder / "store"
    running = start_dpa(made, store, "run")
    heard = 0.0
    for point in sorted(rng.uniform(0, NUM_STEPS * len(STAGES)) for _ in range(num_kills)):
        if not _wait_for_step(running, point, heard):
            break
        kind, after_s = rng.choice(KINDS), rng.uniform(*DELAY_S)
        time.sleep(after_s)
        if kind == "everything":
            told.append(running.kill_all().stdout)
        else:
            pids = running.processes("ray::RayTrainWorker")
            if len(pids) < 2:
                break  # the run is at its end
            for pid in pids if kind == "workers" else [rng.choice(pids)]:
                os.kill(pid, signal.SIGKILL)
        heard = time.time()
        kills.append(Kill(number, kind, after_s, *_state(running.run)))
        if kind == "everything":
            running = start_dpa(made, store, "run")
    run = running.finished(600)
    _note_resumed(kills, [*told, run.stdout])
    return run, kills


def _note_resumed(kills: list[Kill], told: list[str]) -> None:
    """By what the attempts printed, from which step each kill was gone on from."""
    found: list[tuple[str, int] | None] = []  # after each kill
    for number, text in enumerate(told):
        parts = re.split(r"going on from the last checkpoint", text)
        for part in parts if number else parts[1:]:
            step = re.search(r"(\w+) goes on after step (\d+) of", part)
            found.append((step[1], int(step[2])) if step else None)
    if len(found) != len(kills):
        return  # a kill that nobody had time to tell of
    for kill, step in zip(kills, found, strict=True):
        if step is not None and step[0] == kill.stage:
            kill.resumed_from = step[1]


def _wait_for_step(running: Running, point: float, since: float, timeout_s: float = 300) -> bool:
    """Until the run's step `point`, of all stages' together, is told of after `since` with two workers there.

    Returns: False where the run ends first.
    """
    file, until = running.run.folder / "metrics.jsonl", time.monotonic() + timeout_s
    while running.process.poll() is None:
        assert time.monotonic() < until, f"step {point:.0f} is not told of after {timeout_s} s"
        if file.exists() and file.stat().st_mtime > since:
            stage, told, _ = _state(running.run)
            is_there = stage and STAGES.index(stage) * NUM_STEPS + told >= point
            if is_there and len(running.processes("ray::RayTrainWorker")) == 2:
                return True
        time.sleep(0.05)
    return False


def _state(run: Run) -> tuple[str, int, int]:
    """(stage under way, last step told, last step saved)."""
    made = [stage for stage in STAGES if list((run.store / "artifacts").glob(_folder(stage) + "/manifest.json"))]
    if len(made) == len(STAGES):
        return "", 0, 0
    stage = STAGES[len(made)]
    saved = [
        int(p.parent.name.split("-")[1])
        for p in (run.store / "checkpoints").glob(f"{_folder(stage)}/step-*/manifest.json")
    ]
    lines = (run.folder / "metrics.jsonl").read_text().split("\n")[:-1]
    told = [line["step"] for line in map(json.loads, lines) if line["stage"] == stage]
    return stage if told else "", max(told, default=0), max(saved, default=0)


def _folder(stage: str) -> str:
    return stage.replace("_", "-") + "-*"


def check(kills: list[Kill]) -> None:
    """Raises: AssertionError where a run went on from too early a step."""
    for kill in kills:
        if kill.resumed_from is not None:
            assert kill.resumed_from >= kill.saved, kill
            assert kill.told - kill.resumed_from <= EVERY_STEPS, kill


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng, kills, number = random.Random(options.seed), list[Kill](), 0
    with tempfile.TemporaryDirectory(prefix="dpa-kills-") as temporary:
        made = recipe(Path(temporary) / "assets")
        whole = start_dpa(made, Path(temporary) / "whole" / "store", "run").finished(600)
        assert whole.returncode == 0, whole.output
        expected = result(whole)
        while len(kills) < options.kills:
            number += 1
            wanted = min(options.per_run, options.kills - len(kills))
            run, done = killed_run(number, wanted, made, Path(temporary) / f"run-{number}", rng)
            assert run.returncode == 0, run.output
            assert result(run) == expected, f"run {number} ended otherwise than undisturbed"
            check(done)
            kills += done
            print(f"run {number}: {len(done)} kills, ended as undisturbed", flush=True)
    print(table(kills))
    if options.out:
        options.out.write_text(json.dumps([asdict(kill) for kill in kills], indent=1))


def table(kills: list[Kill]) -> str:
    lines = ["killed       stage        kills  after a checkpoint  told from where  most steps repeated"]
    groups = Counter((kill.kind, kill.stage or "between") for kill in kills)
    for (kind, stage), count in sorted(groups.items()):
        mine = [k for k in kills if (k.kind, k.stage or "between") == (kind, stage)]
        saved = sum(k.saved > 0 for k in mine)
        resumed = [k.told - k.resumed_from for k in mine if k.resumed_from is not None]
        lines.append(f"{kind:12} {stage:12} {count:5} {saved:19} {len(resumed):16} {max([0, *resumed]):20}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
