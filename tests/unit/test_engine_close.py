"""Is the memory of a stage free when its engine is closed, though others still hold the module? The next stage needs it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("plain", "0", "1", "2", "3")


def closed(zero_stage: int | None, bf16: bool) -> dict[str, int]:
    """Bytes of all tensors of this process, beyond those that were there: of a module and its engine after a step, and once
    the engine is closed and the module is still held."""
    from tests.engine_worker import Case, make_engine, make_module, take_step

    gc.collect()
    before = held()
    case = Case(zero_stage, bf16=bf16)
    module = make_module(case)
    engine = make_engine(case, module)
    take_step(engine, 0)
    trained = held() - before
    engine.close()
    del engine
    gc.collect()
    assert module is not None
    return {"trained": trained, "closed": held() - before}


def held() -> int:
    """Bytes of all storages that a tensor stands for."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def found(request: pytest.FixtureRequest) -> dict[str, dict[str, int]]:
    """By kind of engine. In a process of its own: it has a process group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.test_engine_close", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    values: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_engine_holds_nothing(found: dict[str, dict[str, int]], kind: str) -> None:
    assert found[kind]["trained"] > 200_000
    assert found[kind]["closed"] < 2_000


if __name__ == "__main__":
    from dpa_ray.engine.zero import _import_deepspeed

    _import_deepspeed(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        found_here = {kind: closed(None if kind == "plain" else int(kind), sys.argv[1] == "bf16") for kind in KINDS}
        torch.distributed.destroy_process_group()
    print(json.dumps(found_here))
