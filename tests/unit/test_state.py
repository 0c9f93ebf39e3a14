"""Does training go on from saved state as if it had never stopped: same engine, other engines, other numbers of ranks?

`tests/state_worker.py` saves after three of five steps, in worlds of 1, 2 and 3 processes, and goes on from each other's
state. No Ray.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpa_ray.engine import state
from dpa_ray.engine.plain import PlainEngine
from dpa_ray.engine.state import Fragment
from tests.engine_worker import SETTINGS, Case, make_module
from tests.state_worker import CASES, SAVED_AFTER, WORLDS, Place, label, origins, read, resumed, steps, write

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400
"""Some 40 s on two free cores."""

Finals = dict[str, dict[str, Tensor]]
PLACES = [(world, case) for world in WORLDS for case in CASES[world]]


@pytest.fixture(scope="module")
def finals(tmp_path_factory: pytest.TempPathFactory) -> Finals:
    """The parameters after all steps, by the label of who made them."""
    folder = tmp_path_factory.mktemp("state")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.state_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: Finals = {}
    for path in folder.glob("*.pt"):
        found |= torch.load(path)
    return found


@pytest.mark.ci
@pytest.mark.parametrize("place", PLACES, ids=label)
def test_an_engine_goes_on_bit_for_bit(finals: Finals, place: Place) -> None:
    expected, found = finals[label(place)], finals[resumed(place, place)]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.ci
@pytest.mark.parametrize("place", [p for p in PLACES if len(origins(p)) > 1], ids=label)
def test_state_of_other_worlds_and_engines_is_as_good(finals: Finals, place: Place) -> None:
    """fp32: what differs is the order of sums before the save."""
    for origin in origins(place)[1:]:
        for name, tensor in finals[resumed(place, origin)].items():
            torch.testing.assert_close(tensor, finals[label(place)][name], atol=1e-5, rtol=0, msg=f"{name}, {origin}")


@pytest.mark.parametrize("missing", [state.MASTER, *state.MOMENTS, "count"])
def test_what_a_checkpoint_keeps_is_needed(tmp_path: Path, missing: str) -> None:
    """Without any part of it the end is another one: the tests above would see it."""
    case = Case(None)
    whole = PlainEngine(make_module(case), SETTINGS, torch.device("cpu"))
    steps(whole, 0, SAVED_AFTER, 0, 1)
    write(whole, tmp_path, 0, 1)
    steps(whole, SAVED_AFTER, SAVED_AFTER + 1, 0, 1)

    engine = PlainEngine(make_module(case), SETTINGS, torch.device("cpu"))
    fresh = state.snapshot(engine.fragments())
    read(engine, tmp_path)
    if missing == "count":
        engine.restored(0)
    else:
        for fragment, old in zip(engine.fragments(), fresh, strict=True):
            fragment.tensors[missing].copy_(old.tensors[missing])
    steps(engine, SAVED_AFTER, SAVED_AFTER + 1, 0, 1)
    names = [name for name, _ in whole.module.model.named_parameters()]
    expected, found = whole.gather(names), engine.gather(names)
    assert max(float((expected[name] - found[name]).abs().max()) for name in names) > 1e-5


def fragment(name: str, start: int, values: list[float]) -> Fragment:
    return Fragment(name, start, {kind: torch.tensor(values) for kind in state.KINDS})


def test_shares_are_equal_and_hold_every_value_once() -> None:
    fragments = [fragment("a", 0, [0, 1, 2, 3, 4]), fragment("b", 0, [5]), fragment("c", 0, [6, 7, 8])]
    for world_size in (1, 2, 3, 4, 9, 11):
        parts = [state.share(fragments, rank, world_size) for rank in range(world_size)]
        sizes = [sum(f.length for f in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        values = torch.cat([f.tensors[state.MASTER] for part in parts for f in part])
        assert values.tolist() == list(range(9))


def test_a_snapshot_stays_as_it_was() -> None:
    live = fragment("a", 0, [1.0, 2.0])
    (copy,) = state.snapshot([live])
    live.tensors[state.MASTER].zero_()
    assert copy.tensors[state.MASTER].tolist() == [1.0, 2.0]


def test_a_stretch_that_nobody_saved_is_named(tmp_path: Path) -> None:
    saved = [fragment("a", 0, [1, 2]), fragment("a", 3, [4, 5])]
    index = {"a": [(start, length, "x") for _, start, length in state.save(saved, tmp_path / "x")]}
    with pytest.raises(ValueError, match="expected values 2 to 5 of a"):
        state.files_for([fragment("a", 0, [0] * 5)], index)
    with pytest.raises(ValueError, match="expected values 0 to 1 of b"):
        state.files_for([fragment("b", 0, [0])], index)
    target = fragment("a", 3, [0, 0])
    state.load([target], index, tmp_path)
    assert target.tensors["exp_avg"].tolist() == [4, 5]
