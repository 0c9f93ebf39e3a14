"""What does one call cost the driver, Ray Train's controller and the head's GCS? Measured on a Ray of its own, in seconds."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from dpa_ray.doctor.plan.control import Costs
from dpa_ray.engine.messages import Beat, Board
from dpa_ray.errors import UserError

NUM_CALLS, NUM_TASKS = 4000, 2000
IDLE_S = 2.0
FLUSH_S = 3.0
"""Ray's processes tell the GCS of tasks once a second."""


class _Timed(Board):
    """A Board that says how much of a CPU it has had."""

    def cpu_s(self) -> float:
        return time.process_time()


def measure() -> Costs:
    """Raises: UserError where a Ray is there already: its own work would be counted too."""
    import ray

    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        raise UserError("--measure: expected no Ray in this process and no RAY_ADDRESS, found one; unset RAY_ADDRESS")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        board: Any = ray.remote(num_cpus=0)(_Timed).remote()
        origin = f"measured here, with {NUM_CALLS:,} calls and {NUM_TASKS:,} tasks"
        return Costs(_board_call_s(ray, board), _poll_s(ray, board), _gcs_task_s(ray), origin)
    finally:
        ray.shutdown()


def _board_call_s(ray: Any, board: Any) -> float:
    beat = Beat("process 1 on a", "dpa_ray/engine/loop.py:140 (train)", True, True, 1.0)
    before = ray.get(board.cpu_s.remote())
    for number in range(NUM_CALLS):
        board.beat.remote(number % 1024, beat)
    return float(ray.get(board.cpu_s.remote()) - before) / NUM_CALLS


def _poll_s(ray: Any, board: Any) -> float:
    """Of the process that asks; what answers is one for each worker."""
    ray.get([board.progress.remote() for _ in range(100)])
    before = time.process_time()
    ray.get([board.progress.remote() for _ in range(NUM_CALLS)])
    return (time.process_time() - before) / NUM_CALLS


def _gcs_task_s(ray: Any) -> float:
    process = _gcs_process(str(ray.get_runtime_context().get_session_name()))
    nothing = ray.remote(num_cpus=0.25)(_nothing)
    ray.get([nothing.remote() for _ in range(50)])
    time.sleep(FLUSH_S)
    idle = _cpu_s(process)
    time.sleep(IDLE_S)
    idle_rate = (_cpu_s(process) - idle) / IDLE_S
    before, begun = _cpu_s(process), time.monotonic()
    ray.get([nothing.remote() for _ in range(NUM_TASKS)])
    time.sleep(FLUSH_S)
    spent = _cpu_s(process) - before - idle_rate * (time.monotonic() - begun)
    return max(spent, 1.0 / os.sysconf("SC_CLK_TCK")) / NUM_TASKS  # at least one tick of the clock it is read from


def _nothing() -> None:
    return None


def _gcs_process(session: str) -> Path:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"gcs_server" in command.split(b"\0")[0] and session.encode() in command:
            return folder
    raise UserError(
        "--measure: expected the GCS among this machine's processes (/proc), found none; leave --measure out"
    )


def _cpu_s(process: Path) -> float:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
