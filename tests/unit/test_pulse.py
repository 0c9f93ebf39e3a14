"""Is honest waiting left alone, does waiting in vain end, and is it seen who came and who did not?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from dpa_ray.engine.failures import describe_hang, root_causes
from dpa_ray.engine.messages import Beat, Board, LastBeat
from dpa_ray.engine.pulse import Standstill, describe
from dpa_ray.errors import UserError
from tests.waiting_worker import HONEST_S

TIMED_OUT = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two processes saw."""
    folder = tmp_path_factory.mktemp("waiting")
    command = [sys.executable, "-m", "tests.waiting_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


@pytest.mark.ci
def test_honest_work_that_others_wait_for_has_no_time_limit(seen: dict[str, Any]) -> None:
    assert seen["honest_s"] > 0.9 * HONEST_S, "longer than a collective may take there"
    assert seen["from_rank_0"] == "said by rank 0"
    place, waits, still_s = seen["at_the_barrier"]
    assert waits
    assert still_s > 1
    assert not place.startswith("dpa_ray/engine/protocol"), "who called it is what one wants to know"


@pytest.mark.ci
def test_a_collective_that_one_does_not_come_to_ends_whatever_its_group(seen: dict[str, Any]) -> None:
    assert "timed out" in seen["in_vain"].lower()
    assert "timed out" in seen["in_vain_in_another_group"].lower()


@pytest.mark.ci
def test_where_a_worker_waits_is_seen_from_its_stack(seen: dict[str, Any]) -> None:
    place, waits = seen["in_a_collective"]
    assert waits
    assert re.fullmatch(r"dpa_ray/engine/protocol\.py:\d+ \(all_sum\)", place)


def last(
    place: str = "dpa_ray/engine/loop.py:7 (train)", *, waits: bool, still_s: float = 0.0, silent_s: float = 0.0
) -> LastBeat:
    return LastBeat(Beat("process 12 on host", place, waits, waits, still_s), silent_s)


def hang(errors: dict[int, Exception], beats: dict[int, LastBeat]) -> str | None:
    return describe_hang({rank: root_causes(err) for rank, err in errors.items()}, beats, timeout_s=600)


def test_a_process_that_does_not_answer_is_named_and_who_came() -> None:
    beats = {0: last(waits=True, still_s=590), 1: last("dpa_ray/model/step.py:9 (forward)", waits=False, silent_s=601)}
    told = hang({1: WorkerHealthCheckTimeoutError("hanging")}, beats) or ""
    assert (
        "longer than 600 s (cluster.collective_timeout_s): worker 0 at dpa_ray/engine/loop.py:7 (train) waits" in told
    )
    assert (
        "worker 1 (process 12 on host) does not answer; 601 s ago it was at dpa_ray/model/step.py:9 (forward)" in told
    )
    assert "look at that process and its machine (worker 1)" in told


def test_a_worker_that_answers_and_does_not_come_is_named_with_where_it_is() -> None:
    beats = {
        0: last(waits=True, still_s=1500, silent_s=3), 1: last("dpa_ray/store/local.py:8 (append)", waits=False, still_s=1495),
        2: last(waits=True, still_s=1499),
    }  # fmt: skip
    told = hang({0: TIMED_OUT}, beats) or ""
    assert "worker 0 at dpa_ray/engine/loop.py:7 (train), worker 2 at dpa_ray/engine/loop.py:7 (train) wait;" in told
    assert "worker 1 (process 12 on host) is at dpa_ray/store/local.py:8 (append), since 1495 s" in told


def test_workers_that_all_wait_point_at_the_network() -> None:
    told = hang({0: TIMED_OUT}, {0: last(waits=True, still_s=1500), 1: last(waits=True, still_s=1500)}) or ""
    assert "all wait for each other" in told
    assert "network" in told


def test_a_worker_that_nccl_ended_as_it_had_waited_too_long_did_not_just_die() -> None:
    beats = {0: last(waits=True, still_s=1490), 1: last(waits=False, still_s=1495)}
    assert "worker 1 (process 12 on host) is at" in (hang({0: RayActorError()}, beats) or "")


@pytest.mark.parametrize(
    ("errors", "beats"),
    [
        pytest.param({0: RayActorError()}, {0: last(waits=False, still_s=900), 1: last(waits=True, still_s=900)}, id="killed"),
        pytest.param({0: RayActorError()}, {0: last(waits=True, still_s=2), 1: last(waits=False)}, id="killed, waited"),
        pytest.param({0: RuntimeError("size mismatch")}, {0: last(waits=True, still_s=2)}, id="an error"),
        pytest.param({0: UserError("the request timed out")}, {0: last(waits=True, still_s=2)}, id="a store's time"),
        pytest.param({0: TIMED_OUT}, {}, id="nothing known"),
    ],
)  # fmt: skip
def test_other_failures_are_not_taken_for_a_hang(errors: dict[int, Exception], beats: dict[int, LastBeat]) -> None:
    assert hang(errors, beats) is None


def test_waiting_for_long_is_told_once_each_time() -> None:
    watch = Standstill(600)
    long, short = {0: last(waits=True, still_s=601), 1: last(waits=False, still_s=9)}, {0: last(waits=True, still_s=1)}
    told = [watch.look(beats) for beats in (short, long, long, short, long)]
    assert [text is not None for text in told] == [False, True, False, False, True]
    assert "waiting for more than 600 s: worker 0 at dpa_ray/engine/loop.py:7 (train) waits; worker 1" in (
        told[1] or ""
    )


def test_the_board_keeps_each_workers_last_beat_and_forgets_those_of_workers_before() -> None:
    board = Board()
    beats = [Beat("process 12 on host", f"place {i}", False, False, 0.0) for i in range(3)]
    board.beat(1, beats[0])
    board.beat(0, beats[1])
    board.beat(1, beats[2])
    time.sleep(0.01)
    kept = board.last_beats()
    assert list(kept) == [0, 1]
    assert kept[1].beat == beats[2]
    assert kept[1].silent_s >= 0.01
    board.put("workers_started", {"number": 1})
    assert board.last_beats() == {}
    assert describe({}, {3}) == "nobody waits; worker 3 does not answer"
