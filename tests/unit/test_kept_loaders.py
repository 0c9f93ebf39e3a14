"""Do processes of data tasks know a loader again, and what do they keep?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpa_ray.data import kept
from tests.unit.test_ingest import prepared_loader
from tests.unit.test_sources import record

MAKE = """
import sys
from pathlib import Path
from dpa_ray.data import kept
from tests.unit.test_ingest import prepared_loader
from tests.unit.test_sources import record
print(kept.digest(prepared_loader(Path(sys.argv[1]), [record(i) for i in range(3)])))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_all_ranks_loaders_have_one_digest(tmp_path: Path, seed: str) -> None:
    """Each makes its own, in a process where sets and dicts of strings may have another order."""
    mine = prepared_loader(tmp_path, [record(i) for i in range(3)])
    env = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [kept.digest(mine)], done.stderr
    mine.load(np.array([0, 2]), 1)
    assert kept.digest(mine) == done.stdout.strip(), "whatever it has read"
    other = prepared_loader(tmp_path, [record(i) for i in range(4)])
    assert kept.digest(other) != kept.digest(mine)


def test_the_two_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def get(reference: str) -> Any:
        fetched.append(reference)
        return f"loader of {reference}"

    monkeypatch.setattr("ray.get", get)
    kept._LOADERS.clear()
    assert [kept.loader(key, [key]) for key in "abab"] == [f"loader of {key}" for key in "abab"]
    assert fetched == ["a", "b"]
    kept.loader("c", ["c"])
    kept.loader("b", ["b"])
    kept.loader("a", ["a"])
    assert fetched == ["a", "b", "c", "a"], "a was the one that had not been used for longest"
    later = time.monotonic() + kept.UNUSED_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    kept.loader("a", ["a"])
    assert list(kept._LOADERS) == ["a"], "the other one is of an earlier stage"
    kept._LOADERS.clear()
