"""Two processes that wait for each other, honestly and in vain; `test_pulse.py` starts them and reads what the first says.

    python -m tests.waiting_worker FOLDER

Writes FOLDER/seen.json.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dpa_ray.engine.protocol import all_sum, barrier, from_rank_0, limit_waits
from dpa_ray.engine.pulse import beating

LIMIT_S = 1.0
HONEST_S = 3.0


class Beats:
    """Stands for a Board's handle, and keeps every beat."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.beat = self  # so that beat.remote is ours

    def remote(self, rank: int, beat: Any) -> None:
        self.all.append(beat)

    def taken(self) -> list[Any]:
        taken, self.all = self.all, []
        return taken


def error_of(action: Any) -> str:
    try:
        action()
    except RuntimeError as err:
        return str(err)
    return ""


def first(folder: Path) -> dict[str, Any]:
    beats, seen = Beats(), {}
    with beating(beats, 0, timeout_s=LIMIT_S):
        barrier()
        seen["from_rank_0"] = from_rank_0("said by rank 0")
        beats.taken()
        begun = time.monotonic()
        barrier()
        seen["honest_s"] = time.monotonic() - begun
        seen["at_the_barrier"] = [(b.place, b.waits, b.still_s) for b in beats.taken()][-1]
        seen["in_vain"] = error_of(lambda: all_sum(torch.ones(1)))
        seen["in_a_collective"] = [(b.place, b.waits) for b in beats.taken()][-2]
        group = next(g for g in torch.distributed.distributed_c10d._world.pg_map if g != torch.distributed.group.WORLD)
        seen["in_vain_in_another_group"] = error_of(lambda: torch.distributed.all_reduce(torch.ones(1), group=group))
    (folder / "seen.json").write_text(json.dumps(seen))
    return seen


def second(folder: Path) -> None:
    barrier()
    from_rank_0("said by rank 1")
    time.sleep(HONEST_S)
    barrier()
    while not (folder / "seen.json").exists():  # alive, connected, and never comes to a collective
        time.sleep(0.05)


def work(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    torch.distributed.new_group([0, 1])  # as DeepSpeed does: with torch's own limit, half an hour
    limit_waits(LIMIT_S)
    (first if rank == 0 else second)(folder)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # imports are done
    processes = [context.Process(target=work, args=(Path(sys.argv[1]), rank), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
