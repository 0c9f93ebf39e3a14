"""What a Ray Train worker does: the tasks of a run, one after the other, each ending in a committed artifact."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dpa_ray.batch import Batch
from dpa_ray.data.ingest import Loader
from dpa_ray.data.retry import bridging, retried
from dpa_ray.engine import examples
from dpa_ray.engine.assembling import (
    blind_scores,
    build,
    cursor_of,
    has_dropout,
    make_engine,
    pad_token,
    probe_arguments,
)
from dpa_ray.engine.blind_job import compute_blind
from dpa_ray.engine.checkpointing import Checkpointer, Leaving, candidates, restore
from dpa_ray.engine.evaluate import evaluate
from dpa_ray.engine.feed import Feed
from dpa_ray.engine.fetching import fetched
from dpa_ray.engine.held_out import held_out_loader, while_running
from dpa_ray.engine.logs import Before, Recorder
from dpa_ray.engine.loop import Plan, Schedule, train
from dpa_ray.engine.messages import STARTED, Orders
from dpa_ray.engine.postmortem import Postmortem
from dpa_ray.engine.protocol import Engine, barrier, from_rank_0, limit_waits, rank, world_size
from dpa_ray.engine.pulse import beating
from dpa_ray.engine.words import Words
from dpa_ray.errors import UserError
from dpa_ray.report.metrics import MetricsLog
from dpa_ray.stages import instruct, proxy_llm
from dpa_ray.stages.build import Built
from dpa_ray.stages.spec import (
    AnyTask,
    BlindTask,
    EvalTask,
    MergeTask,
    Task,
    TrainTask,
)  # fmt: skip
from dpa_ray.stages.trainable import TrainableSet, check_trainable, select_trainable
from dpa_ray.store import checkpoints, lease
from dpa_ray.store.artifacts import commit, find
from dpa_ray.store.checkpoints import Checkpoint
from dpa_ray.store.fs import Store

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

STAGE_METRICS = "metrics.jsonl"
"""In an artifact: the metrics of the stage that made it, for runs that reuse it."""


def run_worker(orders: Orders) -> None:
    """Entry point on every worker: do each task that nobody has done yet."""
    import ray

    tasks: tuple[AnyTask, ...] = ray.get(orders.tasks)
    recipe = tasks[0].recipe
    worker = Worker(Store(orders.store_uri, through=retried), _device(), orders.board)
    if worker.store.is_local and socket.gethostname() != orders.machine:  # a node that came since the run began
        raise UserError(
            f"store: expected one that {socket.gethostname()}, where a worker was started, reaches as {orders.machine} "
            f"does, found the folder {orders.store_uri}; take s3:// or gs://"
        )
    worker.tell(STARTED, number=world_size())
    with (
        bridging(recipe.data.retry_s, worker.note),
        beating(orders.board, rank(), recipe.cluster.collective_timeout_s),
    ):
        for task in tasks:
            with worker.alone(task, orders.owner):
                if not from_rank_0(rank() == 0 and worker.is_made(task)):  # one look for all ranks
                    worker.run(task)
                    worker.tell("task_finished", stage=task.stage)
                elif rank() == 0:
                    worker.take_over(task)
                barrier()
    worker.feed.close()


def _device() -> torch.device:
    import ray.train.torch

    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray sets one thread per CPU that was asked for, but that is a share, not a limit. One core stays for the data
        # tasks: torch's threads wait for each other after every operation, and one that lost its core holds up all.
        workers = max(1, ray.train.get_context().get_local_world_size())
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers - 1))
    return device


class Worker:
    """One process of the worker group."""

    def __init__(self, store: Store, device: torch.device, board: Any):
        self.store = store
        self.device = device
        self.board = board
        self.feed = Feed()
        self.confirm: Callable[[], None] = lambda: None  # rank 0: raises where another process may have taken over

    def run(self, task: AnyTask) -> None:
        self.tell("task_started", stage=task.stage, trains=isinstance(task, TrainTask))
        task = fetched(task)
        if isinstance(task, MergeTask):
            self._merge(task)
        elif isinstance(task, EvalTask):
            self._evaluate(task)
        elif isinstance(task, BlindTask):
            compute_blind(
                task, self.store, self.device, cursor_of(task.reader, self.store), self.tell_from_any, self.confirm
            )
        else:
            self._train(task)
        self._clean_up()

    def _clean_up(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tell(self, kind: str, **values: Any) -> None:
        """An event to the driver; from rank 0 only, never waited for."""
        if self.board is not None and rank() == 0:
            self.board.put.remote(kind, values)

    @contextmanager
    def alone(self, task: Task, owner: str) -> Iterator[None]:
        """Of all runs, this one alone makes the task's result: checkpoints belong to its key, not to a run."""
        if rank() != 0:
            yield
            return
        path = task.result.lease
        # a worker that lost its lease must not write another byte; training is then over for all ranks
        with lease.held(self.store, path, report=self.note, lost=lambda: os._exit(1), owner=owner) as held:
            self.confirm = held.confirm
            yield
            self.confirm()
            try:
                checkpoints.drop(self.store, task.result.stage, task.result.key)
            except (UserError, OSError) as err:  # the result is there
                self.note(f"{task.result.stage} is finished, but its checkpoints could not be removed: {err}")

    def is_made(self, task: Task) -> bool:
        """Is the task's result there, from another run, say?"""
        return find(self.store, task.result.stage, task.result.key) is not None

    def take_over(self, task: AnyTask) -> None:
        """The metrics of a stage that another run has made while this one was without workers."""
        made = task.result.found(self.store)
        if isinstance(task, TrainTask) and made.manifest["meta"].get("run") != task.run_path:
            lines = (task.result.fetched(self.store, [STAGE_METRICS]) / STAGE_METRICS).read_text().splitlines()
            MetricsLog.copy_reused(self.store, task.run_path, task.stage, [json.loads(line) for line in lines])

    def note(self, text: str) -> None:
        """A line for people, from any rank."""
        if self.board is not None:
            self.board.put.remote("note", {"text": text})

    def save_wanted(self) -> bool:
        """Does the controller want a checkpoint before it replaces the workers?"""
        import ray

        return self.board is not None and ray.get(self.board.save_wanted.remote())

    def tell_from_any(self, kind: str, **values: Any) -> None:
        """The same, from every rank."""
        if self.board is not None:
            self.board.put.remote(kind, values)

    def _merge(self, task: MergeTask) -> None:
        if rank() == 0:
            start = time.perf_counter()
            with scratch() as folder:
                proxy_llm.merge(task, self.store, folder)
                self._commit(task, folder, _meta(task, start))

    def _evaluate(self, task: EvalTask) -> None:
        start = time.perf_counter()
        result = evaluate(task, self.store, self.device)
        if rank() == 0:
            assert result is not None
            with scratch() as folder:
                result.write(folder)
                self._commit(task, folder, _meta(task, start))

    def _commit(self, task: Task, folder: Path, meta: dict[str, Any]) -> None:
        result = task.result
        commit(self.store, result.stage, result.key, folder, inputs=task.inputs, meta=meta, confirm=self.confirm)

    def _train(self, task: TrainTask) -> None:
        start = time.perf_counter()
        recipe, stage = task.recipe, task.stage
        section = getattr(recipe.stages, stage)
        built = build(task, self.store)
        trained = select_trainable(built.module.model, stage, built.llm_mode)
        cursor = cursor_of(task, self.store)
        self.tell(
            "stage_started", stage=stage, num_steps=task.num_steps, trainable=trained.description,
            num_parameters=trained.num_parameters, names=list(trained.names),
        )  # fmt: skip
        loader = Loader(
            store=self.store, prepared=task.data, encoder=built.encoder, image_processor=built.image_processor,
            pad_token_id=pad_token(built.encoder.tokenizer), packing=getattr(section, "packing", False),
            retry_s=recipe.data.retry_s, blind=blind_scores(task, self.store),
            skipped=frozenset(skipped.row for skipped in task.skipped), with_images=built.image_processor is not None,
        )  # fmt: skip
        loader.check()
        if (
            task.held_out is not None
        ):  # its conversations may have what the stage's own do not: better now than hours later
            held_out_loader(loader, task.held_out).check()
        whole = Plan(cursor, task.num_steps, rank(), world_size(), section.micro_batch_size)
        words = Words(
            built.module, loader, task.held_out, section.micro_batch_size, self.device,
            note=lambda text: self.note(f"{stage}: {text}"),
        )  # fmt: skip
        engine, batches, plan, before = self._begin(task, built, loader, whole, words)
        check_trainable(built.module.model, {id(p) for p in engine.parameters}, trained, stage, built.llm_mode)
        recorder = Recorder(self.store, task, cursor, self.tell, before, start)
        saver = Checkpointer(
            self.store, task, engine, recorder, self.device, note=self.note,
            saved=lambda step: self.tell("saved", stage=stage, step=step), drained=_drained, confirm=self.confirm,
            wanted=self.save_wanted,
        )  # fmt: skip
        train(
            engine, batches, plan, Schedule(task.num_steps, section.lr, section.warmup_fraction),
            stage=stage, seed=recipe.seed, device=self.device, record=recorder.record, saver=saver,
            evaluate=while_running(task, built.module, loader, self.device),
            explain=Postmortem(self.store, task, recorder.lines),
        )  # fmt: skip
        saver.close()
        recorder.close()
        shown = [] if stage == "proxy_llm" else self._examples(task, built, loader)
        words.look_after()
        self._finish(task, built, engine, trained, recorder, shown, words)

    def _begin(
        self, task: TrainTask, built: Built, loader: Loader, plan: Plan, words: Words
    ) -> tuple[Engine, Iterator[Batch], Plan, Before]:
        """The engine and the batches, at the latest checkpoint that is whole and sound, else at the stage's first step;
        what is left of `plan`; what was written down before."""
        data = task.recipe.data
        engine: Engine | None = None
        looked: dict[str, list[str]] | None = None
        for checkpoint in [*candidates(self.store, task), None]:
            left = replace(plan, steps_done=checkpoint.step if checkpoint else 0)
            # before the engine, so that the first batches are made while the model is put on it
            batches = self.feed.batches(
                loader, left, prefetch=data.prefetch_batches, workers=data.workers,
                stall_timeout_s=data.stall_timeout_s, note=lambda text: self.note(f"{task.stage}: {text}"),
            )  # fmt: skip
            if engine is None:
                engine = make_engine(built, task, self.device, accumulation_steps=plan.most_passes)
                limit_waits(task.recipe.collective_limit_s)
            has_words = checkpoint is not None and words.file in checkpoint.manifest["files"]
            if not has_words and looked is None:
                looked = words.look_before()
            if checkpoint is None:
                break
            before, problem = restore(self.store, checkpoint, engine, self.device, task.recipe.data.retry_s)
            if problem is None:
                if has_words:
                    words.resume(before.words.get(words.file, []))
                else:
                    before.words = looked or {}
                if rank() == 0:
                    self.note(_resumed(task, checkpoint, built))
                return engine, batches, left, before
            self.note(f"{task.stage}: a checkpoint is passed over: {problem}")
        assert engine is not None
        return engine, batches, left, Before(words=looked or {})

    def _examples(self, task: TrainTask, built: Built, loader: Loader) -> list[str]:
        """Samples with the weights of their tokens, for the report; a stage does not fail for want of them."""
        try:
            return examples.collect(built.module, loader, self.device)
        except UserError as err:
            self.note(f"{task.stage}: the report will show no samples with the weights of their tokens: {err}")
            return []

    def _finish(
        self, task: TrainTask, built: Built, engine: Engine, trained: TrainableSet, recorder: Recorder, shown: list[str],
        words: Words,
    ) -> None:  # fmt: skip
        """Gather what was trained, save it, check it, commit it."""
        tensors = engine.gather(list(trained.names))
        expected = None
        if built.finish is not None:
            expected = instruct.probe_logits(built.module.model, *probe_arguments(built, self.device))
        engine.close()
        self._clean_up()
        if rank() == 0:
            with scratch() as folder:
                built.save(tensors, folder)
                if built.finish is not None:
                    assert expected is not None
                    built.finish(folder, expected, self.device)
                (folder / STAGE_METRICS).write_text("".join(recorder.lines))
                if shown:
                    (folder / examples.FILE).write_text("".join(shown), encoding="utf-8")
                words.write(folder)
                meta = {
                    "stage": task.stage, "run": task.run_path, "num_steps": task.num_steps, "world_size": world_size(),
                    **recorder.meta(), "trainable": trained.description, "num_trainable": trained.num_parameters,
                    "loss_first": recorder.loss(0), "loss_last": recorder.loss(-1),
                }  # fmt: skip
                self._commit(task, folder, meta)
        self.tell("stage_finished", stage=task.stage)


@contextmanager
def scratch() -> Iterator[Path]:
    """A local folder for what becomes an artifact. Raises: UserError where the disk is full."""
    with tempfile.TemporaryDirectory() as tmp:
        try:
            yield Path(tmp)
        except (OSError, SafetensorError) as err:  # safetensors tells the system's number in its text only
            if any(number in (getattr(err, "errno", None), _os_error(err)) for number in NO_ROOM):
                raise UserError(
                    f"{tmp}: no room for what the stage has made ({err}); free some space there, or set TMPDIR to another "
                    "folder, and start the same command again: it goes on from the last checkpoint"
                ) from err
            raise


def _os_error(err: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(err))
    return int(found[1]) if found else None


def _meta(task: Task, start: float) -> dict[str, Any]:
    """Of an artifact that no training makes: which run made it, how long that took (`start` by time.perf_counter)."""
    return {"run": task.run_path, "world_size": world_size(), "wall_time_s": time.perf_counter() - start}


def _resumed(task: TrainTask, checkpoint: Checkpoint, built: Built) -> str:
    """That a stage goes on from a checkpoint, for people."""
    text = f"{task.stage} goes on after step {checkpoint.step} of {task.num_steps}"
    written_by = checkpoint.manifest["world_size"]
    if written_by == world_size():
        return text
    text += f", saved by {written_by} workers, on {world_size()}"
    if has_dropout(built.module):
        text += "; its dropout draws other numbers than on as many workers as before"
    return text


def _drained() -> Leaving | None:
    """The nodes of workers that are about to go, as Ray Train told this worker.

    `ray.train.get_preemption_info` gives rank 0's to all ranks, by way of one actor where they wait for each other: for 512 of
    them a third of a second, each time. What Ray's watcher told this worker is there already.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return Leaving(tuple(info.preempted_node_ids), info.deadline_ms / 1000 if info.deadline_ms else None)
