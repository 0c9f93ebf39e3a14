"""What becomes of a stream, and of data that is being prepared, when the processes at work on it are killed?"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from dpa_ray.batch import Arrays, Batch
from dpa_ray.data import ingest, ray_tasks
from dpa_ray.data import prepare as prepare_module
from dpa_ray.data.ingest import Loader, stream
from dpa_ray.data.prepare import prepare
from dpa_ray.engine import feed as feed_module
from dpa_ray.engine.failures import Failures
from dpa_ray.engine.feed import Feed
from dpa_ray.engine.launch import Starting, has_autoscaler
from dpa_ray.engine.messages import FAILED, Beat, Board
from dpa_ray.errors import UserError
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.store import Store
from tests.unit.test_ingest import equal, prepared_loader
from tests.unit.test_prepare import small_parts, tree  # noqa: F401
from tests.unit.test_sources import make, record

WANTED = [(np.array([i % 20]), 0) for i in range(40)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


class Traced(Loader):
    """Leaves a file for each load, named after its process; takes a while, so that a kill meets it at work."""

    def arrays(self, rows: np.ndarray, filler_row: int) -> Arrays:
        (Path(self.store.url("log")) / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.02)
        return super().arrays(rows, filler_row)


class Fatal(Traced):
    """Ends its process at row 13, every time."""

    def arrays(self, rows: np.ndarray, filler_row: int) -> Arrays:
        if rows[0] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().arrays(rows, filler_row)


class Poison(Loader):
    """Ends any process that it is sent to."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def loader_of(kind: type[Loader], folder: Path) -> Loader:
    """One of `kind` over 20 samples."""
    base = prepared_loader(folder, [record(i) for i in range(20)])
    Path(base.store.url("log")).mkdir()
    return kind(**{f.name: getattr(base, f.name) for f in fields(base) if f.init})


def decoding(loader: Loader) -> set[int]:
    """Processes that have decoded and are still there."""
    found = {int(path.name.split("-")[0]) for path in Path(loader.store.url("log")).iterdir()}
    return {pid for pid in found if Path(f"/proc/{pid}").exists()}


def assert_all_in_order(loader: Loader, batches: list[Batch]) -> None:
    assert [batch.rows for batch in batches] == [[(loader.prepared.digest, int(rows[0]))] for rows, _ in WANTED]
    assert all(equal(batch, loader.load(*micro)) for batch, micro in zip(batches, WANTED, strict=True))


def test_batches_are_the_same_though_decode_processes_are_killed(tmp_path, local_ray, monkeypatch):
    """Every process that has decoded anything: none of them is left when the stream goes on."""
    monkeypatch.setattr(ingest, "BLOCK_BYTES", 1)
    loader = loader_of(Traced, tmp_path)
    batches, killed = [], 0
    for batch in stream(loader, WANTED, prefetch=1, workers=2):
        batches.append(batch)
        if len(batches) == 5:
            for pid in decoding(loader):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert killed >= 1
    assert_all_in_order(loader, batches)


def test_a_sample_that_kills_every_process_ends_the_stream_with_what_to_do(tmp_path, local_ray, monkeypatch, capfd):
    monkeypatch.setattr(ray_tasks, "TASK_RETRIES", 1)
    loader = loader_of(Fatal, tmp_path)
    message = r"decode and encode died again and again \(WorkerCrashedError: .*data.workers .*data.prefetch_batches"
    with pytest.raises(UserError, match=message) as caught:
        list(stream(loader, WANTED, prefetch=1, workers=1))
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def kill_feeder(feed: Feed) -> None:
    import ray

    os.kill(ray.get(feed.actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


@pytest.mark.ci
def test_a_feeder_that_is_killed_is_replaced_and_goes_on_where_it_was(tmp_path, local_ray):
    loader = loader_of(Traced, tmp_path)
    feed = Feed()
    batches = []
    for batch in feed.batches(loader, WANTED, prefetch=2, workers=2):
        batches.append(batch)
        if len(batches) == 7:
            kill_feeder(feed)
    assert_all_in_order(loader, batches)
    kill_feeder(feed)  # between two stages
    assert_all_in_order(loader, list(feed.batches(loader, WANTED, prefetch=2, workers=2)))
    feed.close()


def test_feeders_that_die_one_after_the_other_end_with_what_to_do(tmp_path, local_ray, monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_RESTARTS", 1)
    feed = Feed()
    batches = feed.batches(loader_of(Poison, tmp_path), WANTED, prefetch=2, workers=1)
    with pytest.raises(UserError, match=r"died 2 times before batch 1 of 40 came .*data.prefetch_batches") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    feed.close()


# -- preparing


class FatalStore(Store):
    """Ends its process twice: before a shard's upload, and between another one's and its result's."""

    always = False

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return type(self), (self.uri,)

    def once(self, name: str) -> None:
        mark = Path(f"{self.uri}-{name}")
        if self.always or not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def upload(self, folder: Path, path: str, names: Any = None) -> None:
        if names == ["part-00001.parquet"]:
            self.once("upload")
        super().upload(folder, path, names)

    def write_json(self, path: str, value: Any) -> None:
        if path.endswith("parts/00002.json"):
            self.once("result")
        super().write_json(path, value)


class AlwaysFatalStore(FatalStore):
    always = True


@pytest.mark.ci
def test_prepared_bytes_are_the_same_though_tasks_are_killed(tmp_path, small_parts, monkeypatch, local_ray):  # noqa: F811
    monkeypatch.setattr(prepare_module, "IN_PROCESS_ROWS", 10)
    section = make(tmp_path, [record(i) for i in range(40)])
    (tmp_path / "a").mkdir()
    killed = prepare(FatalStore(str(tmp_path / "a" / "store")), section, max_quarantined_fraction=0)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["store", "store-result", "store-upload"]
    whole = Store(str(tmp_path / "b"))
    assert prepare(whole, section, max_quarantined_fraction=0, ray_is_ready=lambda: False) == killed
    assert tree(whole) == tree(Store(str(tmp_path / "a" / "store")))


@pytest.mark.ci
def test_a_part_that_kills_every_process_ends_with_what_to_do(tmp_path, small_parts, monkeypatch, local_ray):  # noqa: F811
    monkeypatch.setattr(prepare_module, "IN_PROCESS_ROWS", 10)
    monkeypatch.setattr(ray_tasks, "TASK_RETRIES", 1)
    section = make(tmp_path, [record(i) for i in range(40)])
    (tmp_path / "a").mkdir()
    store = AlwaysFatalStore(str(tmp_path / "a" / "store"))
    with pytest.raises(UserError, match=r"that prepare set.json died again and again \(WorkerCrashedError: .*are kept"):
        prepare(store, section, max_quarantined_fraction=0)


class Stuck(Loader):
    """Makes nothing of row 13 for longer than anybody waits here."""

    def arrays(self, rows: np.ndarray, filler_row: int) -> Arrays:
        if len(rows) and rows[0] == 13:
            time.sleep(60)
        return super().arrays(rows, filler_row)


def test_a_batch_that_does_not_come_is_said_with_what_was_asked_for_and_what_there_is(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "NOTICE_S", 3.0)
    loader = loader_of(Stuck, tmp_path)
    feed, notes = Feed(), list[str]()
    try:
        batches = feed.batches(loader, WANTED, prefetch=2, workers=1, stall_timeout_s=8, note=notes.append)
        with pytest.raises(
            UserError, match=r"no batch for 8 s \(data\.stall_timeout_s\): waiting for batch \d+ of 40"
        ) as told:
            assert [next(batches).rows for _ in range(20)]
        assert "the cluster has 2 CPU" in str(told.value)
        assert re.fullmatch(r"waiting for data: batch \d+ of 40 has not come for 3 s .*", notes[-1])
    finally:
        feed.close()


def test_workers_that_do_not_come_are_said_with_what_was_asked_for_and_what_there_is(local_ray: None) -> None:
    cluster = ClusterSection(workers=3, gpus_per_worker=0, cpus_per_worker=1, start_timeout_s=0.2)
    starting = Starting(cluster, print)
    starting.check()
    starting.saw("workers_started")
    time.sleep(0.3)
    starting.check()  # they are there: no limit
    starting.saw("failed")
    starting.saw("saved")  # of what is left of the old ones
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"no workers for 0\.2 s .*expected 3 CPU, found 2 CPU in all; \S+ CPU free"):
        starting.check()


def test_a_ray_that_does_not_grow_is_known(local_ray: None) -> None:
    assert not has_autoscaler()


# Whole workers, as Ray Train's controller tells of them


def board_of_its_own() -> Any:
    import ray

    return ray.remote(num_cpus=0)(Board).remote()


def events(board: Any) -> list[tuple[str, str]]:
    import ray

    return [(kind, values.get("text", "")) for kind, values, _ in ray.get(board.take.remote())]


def told(failures: Failures, board: Any, state: Any) -> str:
    """The note of one change of the controller's state, after which workers are waited for."""
    failures.after_controller_state_update(RunningState(), state)
    (note, text), failed = events(board)
    assert (note, failed) == ("note", (FAILED, ""))
    return text


def died(*, preempted: bool = False) -> RestartingState:
    error = RayActorError()
    error._preempted = preempted
    return RestartingState(WorkerGroupError("died", {1: WorkerHealthCheckFailedError("health", error)}))


def drained() -> RestartingState:
    """The deadline of a drain passed while workers were still there: no worker failed."""
    info = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [1, 2]})
    return RestartingState(PreemptionError(info, drain_timed_out=True))


def test_preemptions_and_failures_have_budgets_of_their_own_and_progress_restores_both(local_ray: None) -> None:
    import ray

    board = board_of_its_own()
    failures = Failures(board, max_failures=1, max_preemptions=2, collective_timeout_s=600)
    assert "failure 1 of 1, before the first step" in told(failures, board, died())
    board.put.remote("step", {"stage": "instruct", "step": 7})
    events(board)
    assert "of worker 1, 2 (preemption 1, after step 7 of instruct)" in told(failures, board, drained())
    assert "of worker 1 (preemption 2, after step 7 of instruct)" in told(failures, board, died(preempted=True))
    board.put.remote("saved", {"stage": "instruct", "step": 6})
    events(board)
    assert "preemption 3" in told(failures, board, drained())
    lost = died()
    assert "failure 1 of 1" in told(failures, board, lost)
    failures.after_controller_state_update(lost, lost)  # Ray says it again while there is no room for workers
    assert events(board) == [], "one failure, however long nobody can be put in its place"
    assert "preemption 4" in told(failures, board, drained())
    with pytest.raises(
        UserError,
        match=r"3 times without a new checkpoint in between, after step 7 of instruct .*cluster\.max_preemptions: 2",
    ):
        failures.after_controller_state_update(RunningState(), drained())
    with pytest.raises(UserError, match=r"worker 1 was lost.*2 times without.*cluster\.max_failures: 1"):
        failures.after_controller_state_update(RunningState(), died())
    assert events(board) == [], "a run that ends waits for no workers"
    ray.kill(board)


def test_rays_controller_does_not_fill_its_disk_with_that_it_is_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import elastic

    monkeypatch.setattr(elastic.logger, "level", logging.DEBUG)
    elastic.logger.manager._clear_cache()
    assert elastic.logger.isEnabledFor(logging.DEBUG)
    Failures(None, max_failures=0, max_preemptions=0, collective_timeout_s=600).after_controller_start(None)
    assert not elastic.logger.isEnabledFor(logging.DEBUG)
    assert elastic.logger.isEnabledFor(logging.INFO)


def test_without_a_limit_preemptions_go_on(local_ray: None) -> None:
    import ray

    board = board_of_its_own()
    failures = Failures(board, max_failures=0, max_preemptions=None, collective_timeout_s=600)
    for number in range(1, 51):
        assert f"(preemption {number}," in told(failures, board, drained())
    ray.kill(board)


def test_workers_that_are_replaced_as_the_cluster_grew_are_waited_for_and_no_failure(local_ray: None) -> None:
    import ray

    board = board_of_its_own()
    failures = Failures(board, max_failures=0, max_preemptions=0, collective_timeout_s=600)
    resized = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1}))

    def train() -> None:
        while not ray.get(board.save_wanted.remote()):
            time.sleep(0.01)
        ray.get(board.put.remote("saved", {"stage": "instruct", "step": 5}))

    ray.get(board.put.remote("task_started", {"stage": "instruct", "trains": True}))
    events(board)
    assert "room for 3 workers" in told(failures, board, resized), "nothing is waited for that has not begun"
    ray.get(board.put.remote("task_started", {"stage": "instruct", "trains": True}))
    ray.get(board.put.remote("step", {"stage": "instruct", "step": 4}))
    events(board)
    worker = threading.Thread(target=train)
    worker.start()
    failures.after_controller_state_update(RunningState(), resized)
    worker.join()
    assert [kind for kind, _ in events(board)] == ["saved", "note", FAILED], "what was trained is saved before"
    ray.get(board.put.remote("task_finished", {"stage": "instruct"}))
    events(board)
    assert "room for 3 workers" in told(failures, board, resized)
    failures.after_controller_state_update(resized, SchedulingState(resized.scaling_decision))
    failures.after_controller_state_update(RunningState(), RunningState())
    assert events(board) == []
    ray.kill(board)


def test_a_hang_that_comes_again_ends_the_run_with_who_came_and_who_did_not(local_ray: None) -> None:
    import ray

    board = board_of_its_own()
    failures = Failures(board, max_failures=0, max_preemptions=None, collective_timeout_s=600)
    ray.get(board.beat.remote(0, Beat("process 11 on a", "dpa_ray/engine/loop.py:7 (train)", True, True, 590.0)))
    ray.get(board.beat.remote(1, Beat("process 12 on b", "dpa_ray/model/step.py:9 (forward)", False, False, 0.0)))
    stopped = RestartingState(WorkerGroupError("hangs", {1: WorkerHealthCheckTimeoutError("hangs")}))
    with pytest.raises(UserError, match=r"worker 1 \(process 12 on b\) does not answer.*cluster\.max_failures: 0"):
        failures.after_controller_state_update(RunningState(), stopped)
    ray.kill(board)


def test_what_a_worker_said_to_the_user_ends_the_run_with_it(local_ray: None) -> None:
    import ray

    board = board_of_its_own()
    failures = Failures(board, max_failures=9, max_preemptions=None, collective_timeout_s=600)
    with pytest.raises(UserError, match="lower the learning rate"):
        failures.after_controller_state_update(
            RunningState(), RestartingState(WorkerGroupError("told", {0: UserError("lower the learning rate")}))
        )
    ray.kill(board)
