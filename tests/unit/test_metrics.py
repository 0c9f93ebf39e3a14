"""Is there exactly one line per (stage, step) in metrics.jsonl, whatever was killed, resumed or reused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpa_ray.errors import UserError
from dpa_ray.report.metrics import Files, MetricsLog, read
from dpa_ray.store.fs import Store

RUN = "runs/tiny"
FILE = f"{RUN}/metrics.jsonl"


class Folder:
    """A folder that counts its writes; not local, it cannot append, as S3 cannot."""

    def __init__(self, root: Path, is_local: bool):
        self.root, self.is_local = root, is_local
        self.num_writes = 0

    def url(self, path: str) -> str:
        return str(self.root / path)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read_bytes(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write_bytes(self, path: str, data: bytes) -> None:
        self.num_writes += 1
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def append_line(self, path: str, line: str) -> None:
        assert self.is_local
        assert "\n" not in line
        with (self.root / path).open("a") as file:
            file.write(line + "\n")


@pytest.fixture(params=[True, False], ids=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Store(str(tmp_path)) if request.param else Folder(tmp_path, is_local=False)


def record(stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": step / 2, **more}


def run(store: Files, stage: str, first: int, last: int, **more: Any) -> None:
    """Steps `first` to `last` of a stage; those before are what a checkpoint has of it."""
    log = MetricsLog(store, RUN)
    log.start(stage, [r for r in read(store, RUN) if r["stage"] == stage][: first - 1])
    for step in range(first, last + 1):
        log.append(record(stage, step, **more))
    log.flush()


def steps(store: Files) -> list[tuple[str, int]]:
    return [(r["stage"], r["step"]) for r in read(store, RUN)]


def test_stages_follow_each_other(store: Files) -> None:
    run(store, "one", 1, 2)
    run(store, "two", 1, 3)
    assert steps(store) == [("one", 1), ("one", 2), ("two", 1), ("two", 2), ("two", 3)]
    assert read(store, RUN)[1] == record("one", 2)


def test_a_resumed_stage_drops_the_lines_after_its_checkpoint_and_no_others(store: Files) -> None:
    run(store, "one", 1, 3)
    run(store, "two", 1, 5, attempt=1)
    run(store, "two", 4, 6, attempt=2)
    assert steps(store) == [("one", s) for s in (1, 2, 3)] + [("two", s) for s in range(1, 7)]
    assert [r["attempt"] for r in read(store, RUN) if r["stage"] == "two"] == [1, 1, 1, 2, 2, 2]


def test_a_stage_that_another_run_began_has_its_lines_from_the_checkpoint(store: Files) -> None:
    run(store, "one", 1, 2)
    log = MetricsLog(store, RUN)
    log.start("two", [record("two", step, run="other") for step in (1, 2)])
    log.append(record("two", 3))
    log.flush()
    assert steps(store) == [("one", 1), ("one", 2), ("two", 1), ("two", 2), ("two", 3)]
    assert read(store, RUN)[2]["run"] == "other"


def test_a_run_that_passes_through_its_stages_again_ends_in_stage_order(store: Files) -> None:
    for stage in ("one", "two", "three"):
        run(store, stage, 1, 2)
    run(store, "one", 1, 2, attempt=2)  # its artifact was deleted
    MetricsLog.copy_reused(store, RUN, "two", [r for r in read(store, RUN) if r["stage"] == "two"])
    run(store, "three", 2, 2)
    assert steps(store) == [(stage, step) for stage in ("one", "two", "three") for step in (1, 2)]
    assert [r.get("reused", False) for r in read(store, RUN)] == [False, False, True, True, False, False]


def test_reused_lines_replace_what_was_there_and_twice_is_once(store: Files) -> None:
    run(store, "one", 1, 5)
    lines = [record("one", 1), record("one", 2)]
    for _ in range(2):
        MetricsLog.copy_reused(store, RUN, "one", lines)
    assert read(store, RUN) == [{**line, "reused": True} for line in lines]
    assert "reused" not in lines[0]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_by_a_kill_is_dropped(store: Files, cut: int) -> None:
    run(store, "one", 1, 3)
    whole = store.read_bytes(FILE)
    store.write_bytes(FILE, whole[:-cut])
    complete = 3 if cut == 1 else 2  # only the newline is gone: the record is whole
    assert steps(store) == [("one", s) for s in range(1, complete + 1)]
    run(store, "one", complete + 1, 4)
    assert steps(store) == [("one", s) for s in range(1, 5)]
    assert all(json.loads(line) for line in store.read_bytes(FILE).splitlines())


def test_a_broken_line_in_the_middle_is_told_with_its_place(store: Files) -> None:
    run(store, "one", 1, 3)
    lines = store.read_bytes(FILE).splitlines(keepends=True)
    store.write_bytes(FILE, lines[0] + b"no json\n" + lines[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected .* found 'no json'"):
        MetricsLog(store, RUN).start("one", [record("one", 1)])


def test_numbers_that_are_not_finite_are_null_and_every_line_is_json(store: Files) -> None:
    run(store, "one", 1, 1, a=float("nan"), b=float("inf"), c=[-float("inf"), 1.5], d={"e": float("nan")})
    (line,) = store.read_bytes(FILE).splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    got = json.loads(line, parse_constant=refuse)
    assert (got["a"], got["b"], got["c"], got["d"]) == (None, None, [None, 1.5], {"e": None})


def test_scalars_of_numpy_and_torch_are_numbers(store: Files) -> None:
    run(store, "one", 1, 1, a=np.float32(1.5), b=torch.tensor(2), c=np.float64("nan"), d=np.int64(3))
    (got,) = read(store, RUN)
    assert (got["a"], got["b"], got["c"], got["d"]) == (1.5, 2, None, 3)


def test_a_step_left_out_or_written_twice_is_our_bug(store: Files) -> None:
    log = MetricsLog(store, RUN)
    log.start("one")
    log.append(record("one", 1))
    for wrong in (record("one", 1), record("one", 3), record("two", 2)):
        with pytest.raises(AssertionError):
            log.append(wrong)


def test_a_local_line_is_there_at_once_and_s3_is_written_only_at_flush(tmp_path: Path) -> None:
    for is_local in (True, False):
        store = Folder(tmp_path / str(is_local), is_local)
        log = MetricsLog(store, RUN)
        log.start("one")
        before = store.num_writes
        for step in range(1, 11):
            log.append(record("one", step))
        assert len(read(store, RUN)) == (10 if is_local else 0)
        log.flush()
        assert len(read(store, RUN)) == 10
        assert store.num_writes - before == (0 if is_local else 1)


def test_a_run_without_metrics_has_none(store: Files) -> None:
    assert read(store, RUN) == []
