"""The state tests in processes of their own: every engine saves in the middle, and others go on from there.

    python -m tests.state_worker FOLDER

Writes FOLDER/whole-*.pt and FOLDER/resumed-*.pt of rank 0, {label: the final tensors}, with torch.save.
`test_state.py` starts it and compares.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa_ray.engine import state
from dpa_ray.engine.protocol import Engine
from dpa_ray.engine.zero import _import_deepspeed
from tests.engine_worker import STEPS, Case, make_engine, make_module, take_step

SAVED_AFTER = 3
WORLDS = (1, 2, 3)
CASES = {
    1: [Case(None), Case(2), Case(3)],
    2: [
        *(Case(stage) for stage in (None, 0, 1, 2, 3)), *(Case(stage, bf16=True) for stage in (None, 0, 2, 3)),
        Case(2, trained="connector"), Case(3, trained="lora"), Case(2, tied=True), Case(3, tied=True),
    ],
    3: [Case(None), Case(2), Case(3)],
}  # fmt: skip
"""By world size."""

Place = tuple[int, Case]
"""World size and engine."""


def origins(place: Place) -> list[Place]:
    """Whose state an engine goes on from: its own; in the plain cases also that of the same engine in another world, and
    of another engine in the third."""
    world_size, case = place
    if case not in CASES[1]:
        return [place]
    first, second = (world for world in WORLDS if world != world_size)
    other = CASES[1][(CASES[1].index(case) + 1) % len(CASES[1])]
    return [place, (first, case), (second, other)]


def label(place: Place) -> str:
    return f"{place[0]}-{place[1].zero_stage}-{place[1].bf16}-{place[1].trained}-{place[1].tied}"


def resumed(place: Place, origin: Place) -> str:
    return f"{label(place)} from {label(origin)}"


def steps(engine: Engine, first: int, last: int, rank: int, world_size: int) -> None:
    for step in range(first, last):
        take_step(engine, step, rank, world_size)


def write(engine: Engine, folder: Path, rank: int, world_size: int) -> None:
    folder.mkdir(exist_ok=True)
    fragments = engine.fragments()
    if engine.replicated:
        fragments = state.share(fragments, rank, world_size)
    file = f"rank-{rank}.safetensors"
    saved = state.save(state.snapshot(fragments), folder / file)
    (folder / f"rank-{rank}.json").write_text(json.dumps([[*entry, file] for entry in saved]))


def read(engine: Engine, folder: Path) -> None:
    index: state.Index = {}
    for path in folder.glob("rank-*.json"):
        for name, start, length, file in json.loads(path.read_text()):
            index.setdefault(name, []).append((start, length, file))
    fragments = engine.fragments()
    assert state.files_for(fragments, index)
    state.load(fragments, index, folder)
    engine.restored(SAVED_AFTER)
    assert engine.num_updates() == SAVED_AFTER


def final(engine: Engine) -> dict[str, Tensor]:
    return engine.gather([name for name, _ in engine.module.model.named_parameters(remove_duplicate=False)])


def work(rank: int, world_size: int, folder: str, resume: bool) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meet = f"file://{folder}/meet-{world_size}-{resume}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for case in CASES[world_size]:
        for origin in origins((world_size, case)) if resume else [None]:
            engine = make_engine(case, make_module(case))
            if origin is None:
                steps(engine, 0, SAVED_AFTER, rank, world_size)
                assert engine.num_updates() == SAVED_AFTER
                write(engine, Path(folder, label((world_size, case))), rank, world_size)
                name = label((world_size, case))
            else:
                read(engine, Path(folder, label(origin)))
                name = resumed((world_size, case), origin)
            steps(engine, SAVED_AFTER, len(STEPS), rank, world_size)
            found[name] = final(engine)
    if rank == 0:
        torch.save(found, f"{folder}/{'resumed' if resume else 'whole'}-{world_size}.pt")
    torch.distributed.destroy_process_group()


def main(folder: str) -> int:
    _import_deepspeed(torch.device("cpu"))
    context = multiprocessing.get_context("fork")
    for resume in (False, True):
        for world_size in WORLDS:
            ranks = [
                context.Process(target=work, args=(rank, world_size, folder, resume)) for rank in range(world_size)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(200)
            if any(process.exitcode != 0 for process in ranks):
                for process in ranks:
                    process.kill()
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
