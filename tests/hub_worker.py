"""Processes of several nodes that want one hub model; `test_hub.py` starts them and reads what each says.

    python -m tests.hub_worker FOLDER NAME COMMIT

Four processes, two on each of two nodes, which have caches of their own. Each writes FOLDER/RANK.txt: where the model is on
its node, or the error. HF_ENDPOINT names the hub.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import torch

from dpa_ray.data import retry
from dpa_ray.data.prepare import Prepared
from dpa_ray.engine.fetching import fetched
from dpa_ray.errors import UserError
from dpa_ray.model.vlm import ModelRef
from dpa_ray.recipe import parse
from dpa_ray.stages.spec import ArtifactRef, BaseLlm, ProxyLlmTask, Weights
from tests.recipe_helpers import SMALLEST

NUM_RANKS, PER_NODE = 4, 2


def work(folder: Path, name: str, commit: str, rank: int) -> None:
    node: Any = f"node-{rank // PER_NODE}"
    socket.gethostname = lambda: node
    constants.HF_HUB_CACHE = str(folder / node)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    base = BaseLlm(Weights(name, "1", ref=ModelRef(name, commit)))
    task = ProxyLlmTask(ArtifactRef("proxy-llm", "0"), {}, parse(SMALLEST), "runs/x", base, Prepared("d", 1, (), 0), 1)
    try:
        with retry.bridging(60):
            placed = fetched(task)
        assert isinstance(placed, ProxyLlmTask)
        ref = placed.base.weights.ref
        assert ref is not None
        said = str(ref.folder)
        assert (Path(said) / "model.safetensors").is_file()
    except UserError as err:
        said = f"UserError: {err}"
    (folder / f"{rank}.txt").write_text(said)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # imports are done
    where, of, at = Path(sys.argv[1]), *sys.argv[2:4]
    processes = [context.Process(target=work, args=(where, of, at, rank), daemon=True) for rank in range(NUM_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
