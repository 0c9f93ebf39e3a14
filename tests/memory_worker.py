"""What the engines really hold between steps: bytes of all tensors, in worlds of one and two.

    python -m tests.memory_worker FOLDER

Writes FOLDER/<world size>-<rank>.json, {case: bytes}, beside what the doctor estimates. `test_doctor_memory.py` starts it.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

import torch

from dpa_ray.doctor import memory
from dpa_ray.engine.zero import _import_deepspeed
from tests.engine_worker import Case, make_engine, take_step
from tests.random_models import make_step, make_vlm

WIDTH = 360
"""A square of it is more than the 100,000 elements up to which ZeRO 3 keeps a tensor whole on every rank."""


def held_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from objects that are asked what they are
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def cases() -> list[Case]:
    return [Case(stage, bf16) for stage in (None, 0, 1, 2, 3) for bf16 in (False, True)]


def measure(case: Case, rank: int, world_size: int) -> dict[str, int]:
    """Bytes held after two steps, and what was estimated of it."""
    before = held_bytes()
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    model = make_vlm(dtype=dtype, hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and "embed_tokens" not in name)
    counts = memory.count(model, model.get_output_embeddings())  # before ZeRO 3 takes the parameters apart
    module = make_step(model, "uniform").train()
    engine = make_engine(case, module)
    for step in range(2):
        take_step(engine, step, rank, world_size)
    found = memory.estimate(
        counts, zero_stage=case.zero_stage, world_size=world_size, bf16=case.bf16, num_slots=0, num_targets=0, kept=0,
        on_gpu=False,
    )  # fmt: skip
    return {"held": held_bytes() - before, **found.to_dict(), "state_bytes": found.state, "trained": counts.trained}


def work(rank: int, world_size: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meet = f"file://{folder}/meet-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    found = {case.name: measure(case, rank, world_size) for case in cases()}
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main(folder: str) -> int:
    _import_deepspeed(torch.device("cpu"))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, size, folder)) for size, rank in ((2, 0), (2, 1), (1, 0))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
