"""When and how is the state of a stage under way saved, and taken up again?

Every rank writes what it has of the state, in a thread of its own, to a folder of its own, and uploads it; rank 0 writes
the manifest once all are there. What all ranks must agree on (is it time, has a rank failed) goes with the numbers that a
step sums over the ranks anyway.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.retry import bridging, retried
from dpa_ray.engine import state
from dpa_ray.engine.logs import METRICS, SAMPLES, WORDS_PREFIX, Before, Recorder
from dpa_ray.engine.protocol import Engine, all_sum, barrier, from_rank_0, rank, world_size
from dpa_ray.errors import UserError
from dpa_ray.stages.spec import TrainTask
from dpa_ray.store import checkpoints
from dpa_ray.store.cache import forget
from dpa_ray.store.checkpoints import Checkpoint, Damaged
from dpa_ray.store.digests import digest_folder
from dpa_ray.store.fs import Store

DRAIN_EVERY_S = 2.0
"""How often rank 0 looks whether a node of its workers is about to go."""
BEFORE_GOING_S = 10.0
"""How long before a node goes the last checkpoint is begun, beside twice the time that one has taken."""
WANTED_AGAIN_S = 30.0
"""How soon after a checkpoint, which may have failed, another is made because somebody else wants one."""
POLL_S = 0.05
LIST_EVERY_S = 2.0
"""How often at most, after a while, rank 0 looks whether the other ranks have written."""

TMP_PREFIX = "dpa_ray-checkpoint-"
"""Of local folders, followed by the number of the process that writes there."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaving:
    """Workers' nodes that are about to go."""

    nodes: tuple[str, ...]
    at_s: float | None = None  # time.time of the first one's end, where that is known


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    path: str
    fragments: list[state.Fragment]
    num_updates: int
    untaught: dict[int, tuple[str | None, str]]
    lines: dict[str, list[str]]  # rank 0: by file
    meta: dict[str, Any]
    by_steps: bool  # not by time
    given_up: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Checkpointer:
    """Saves one stage's state while it trains. All ranks make the same calls."""

    def __init__(
        self,
        store: Store,
        task: TrainTask,
        engine: Engine,
        recorder: Recorder,
        device: torch.device,
        *,
        note: Callable[[str], None],
        saved: Callable[[int], None],
        drained: Callable[[], Leaving | None],
        confirm: Callable[[], None] = lambda: None,
        wanted: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            note: takes what a person should know, on any rank.
            saved: rank 0: is told the step of every checkpoint that is whole.
            drained: rank 0: which workers' nodes are about to go, or None?
            confirm: rank 0: raises where another process may have taken the stage over.
            wanted: rank 0: does anybody else want a checkpoint now?
        """
        self.store, self.task, self.engine, self.recorder, self.device = store, task, engine, recorder, device
        self.section = task.recipe.checkpoint
        self.note, self.saved, self.drained, self.confirm, self.wanted = note, saved, drained, confirm, wanted
        self.stage, self.key = task.result.stage, task.result.key
        self.pending: _Pending | None = None
        self.leaving: Leaving | None = None
        self.last_chance_s = math.inf  # time.time
        self.last_save = self.last_look = time.monotonic()
        sweep_tmp()

    def votes(self) -> list[float]:
        """Rank 0: is it time to save, or asked for, and are other nodes than before about to go? Any rank: is it still writing, has it failed to?"""
        now, first, every_s = time.monotonic(), rank() == 0, self.section.every_s
        due = first and every_s is not None and now - self.last_save >= every_s
        due = due or (first and time.time() >= self.last_chance_s)
        leaving = False
        if first and now - self.last_look >= DRAIN_EVERY_S:
            self.last_look = now
            before, self.leaving = self.leaving, self.drained()
            leaving = self.leaving is not None and self.leaving != before
            due = due or (now - self.last_save >= WANTED_AGAIN_S and self.wanted())
        return [float(vote) for vote in (due, leaving, *self._progress())]

    def before_telling(self) -> None:
        """A step is made and not yet told: what `every_steps` asked for before it must be whole first, so that never
        more than that many steps are told and made again."""
        if self.pending is not None and self.pending.by_steps:
            begun = time.monotonic()
            self._settle()
            self.recorder.saving_s += time.monotonic() - begun

    def after(self, step: int, votes: Sequence[float]) -> None:
        """`step` (from 1) is done; `votes` are summed over the ranks. Save, where it is time."""
        begun = time.monotonic()
        due, leaving, busy, failed = map(bool, votes)
        if failed:
            self._give_up()
        every_steps = self.section.every_steps
        if leaving or (every_steps is not None and step % every_steps == 0):
            self._settle()
            self._save(step, by_steps=True)
        elif due and not busy:
            self._save(step, by_steps=False)
        if leaving:
            self._settle()
            self.note(f"{self.task.stage}: a node is about to go; step {step} is saved")
            if self.leaving is not None and self.leaving.at_s is not None:  # so that hardly a step is made again
                self.last_chance_s = self.leaving.at_s - BEFORE_GOING_S - 2 * (time.monotonic() - begun)
        self.recorder.saving_s += time.monotonic() - begun

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        begun = time.monotonic()
        self._settle()
        self.recorder.saving_s += time.monotonic() - begun

    def _progress(self) -> tuple[bool, bool]:
        pending = self.pending
        return pending is not None and pending.busy, pending is not None and pending.error is not None

    def _settle(self) -> None:
        """Wait, on all ranks alike, until what is being written is whole or given up."""
        while True:
            busy, failed = all_sum(torch.tensor([float(x) for x in self._progress()], device=self.device))
            if failed:
                self._give_up()
                return
            if not busy:
                self.pending = None
                return
            time.sleep(POLL_S)

    def _give_up(self) -> None:
        """One rank could not write: training goes on, and the next time it is tried again."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        pending.given_up.set()
        if pending.error is not None:
            self.note(
                f"{self.task.stage}: the checkpoint of step {pending.step} could not be written: {pending.error}; training "
                "goes on"
            )

    def _save(self, step: int, *, by_steps: bool) -> None:
        self.last_save, self.last_chance_s = time.monotonic(), math.inf
        attempt = from_rank_0(uuid.uuid4().hex[:8])
        fragments = self.engine.fragments()
        if self.engine.replicated:
            fragments = state.share(fragments, rank(), world_size())
        pending = _Pending(
            step, checkpoints.path_of(self.stage, self.key, step, attempt), state.snapshot(fragments),
            self.engine.num_updates(), dict(self.recorder.untaught.found), {}, self.recorder.meta(), by_steps,
        )  # fmt: skip
        if rank() == 0:
            pending.lines = self.recorder.snapshot()
        pending.thread = threading.Thread(target=self._write, args=(pending,), name="checkpoint", daemon=True)
        self.pending = pending
        pending.thread.start()

    def _write(self, pending: _Pending) -> None:
        """In the thread: no collectives here."""
        try:
            with (
                bridging(self.task.recipe.data.retry_s),
                tempfile.TemporaryDirectory(prefix=f"{TMP_PREFIX}{os.getpid()}-") as tmp,
            ):
                store, folder = BridgedStore(self.store), Path(tmp)
                name = _file_of(rank())
                stretches = state.save(pending.fragments, folder / name)
                pending.fragments = []
                for file, lines in pending.lines.items():
                    (folder / file).write_text("".join(lines))
                files = digest_folder(folder)
                store.upload(folder, pending.path, list(files))
                untaught = [[row, *sample] for row, sample in pending.untaught.items()]
                found = {"files": files, "fragments": stretches, "untaught": untaught}
                store.write_json(f"{pending.path}/{_note_of(rank())}", found)
                if rank() == 0:
                    self._finish(store, pending)
        except Exception as err:  # anything: the training thread says it, and goes on
            _log.warning("checkpoint of step %d", pending.step, exc_info=True)
            pending.error = str(err) or type(err).__name__

    def _finish(self, store: BridgedStore, pending: _Pending) -> None:
        """Rank 0: the manifest, when every rank's note is there."""
        notes = {_note_of(number) for number in range(world_size())}
        pause_s = POLL_S
        while not notes <= set(store.list(pending.path)):  # of many ranks a long listing, made beside training
            if pending.given_up.wait(pause_s):
                return
            if not pending.by_steps:  # else training waits for it
                pause_s = min(2 * pause_s, LIST_EVERY_S)
        files: dict[str, Any] = {}
        index: dict[str, list[Any]] = {}
        untaught: list[Any] = []
        for number in range(world_size()):
            found = store.read_json(f"{pending.path}/{_note_of(number)}")
            files |= found["files"]
            untaught += found["untaught"]
            for name, start, length in found["fragments"]:
                index.setdefault(name, []).append([start, length, _file_of(number)])
        self.recorder.log.flush()  # a checkpoint does not count before the metrics up to it are there
        rest = {
            "files": files, "index": index, "num_updates": pending.num_updates, "world_size": world_size(),
            "untaught": untaught, "meta": pending.meta,
        }  # fmt: skip
        self.confirm()
        checkpoints.finish(store, pending.path, self.stage, self.key, pending.step, rest)
        self.saved(pending.step)
        try:
            self.confirm()
            checkpoints.collect(store, self.stage, self.key, keep=self.section.keep, newest=pending.path)
        except (UserError, OSError) as err:  # the checkpoint itself is whole
            _log.warning("older checkpoints could not be removed: %s", err)


def sweep_tmp() -> None:
    """Remove the local folders of processes that were killed while they saved."""
    for folder in Path(tempfile.gettempdir()).glob(f"{TMP_PREFIX}*-*"):
        process = folder.name.removeprefix(TMP_PREFIX).split("-")[0]
        if process.isdigit() and not _lives(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def candidates(store: Store, task: TrainTask) -> list[Checkpoint]:
    """What the stage could go on from, latest first; the same on every rank. Raises: UserError where the store is away."""
    found = []
    if rank() == 0:
        with bridging(task.recipe.data.retry_s):
            found = checkpoints.whole_ones(BridgedStore(store), task.result.stage, task.result.key)
    return from_rank_0([checkpoint for checkpoint in found if checkpoint.step <= task.num_steps])


def restore(
    store: Store, checkpoint: Checkpoint, engine: Engine, device: torch.device, retry_s: float = 0.0
) -> tuple[Before, str | None]:
    """Put the state of `checkpoint` into `engine`; returns what was written down until then (rank 0), and what is wrong
    with the checkpoint, where it is damaged: then the engine is as it was.

    All ranks call it, and all or none go on from it. Raises: UserError or OSError where it cannot be read, though it may
    be sound (a server that is away for longer than `retry_s`, a full disk).
    """
    fragments, before, problem, num_updates = engine.fragments(), Before(), None, 0
    kept = state.snapshot(fragments)
    try:
        with bridging(retry_s):
            index = _index(checkpoint.manifest)
            names = state.files_for(fragments, index)
            url = store.url(checkpoint.path)
            folder = retried(lambda: checkpoints.fetch(store, checkpoint, names), url)
            num_updates = int(checkpoint.manifest["num_updates"])
            if rank() == 0:
                before = retried(lambda: _written_until(store, checkpoint), url)
            state.load(fragments, index, folder)
    except Damaged as err:
        problem = str(err)
    except (UserError, OSError):
        raise
    except Exception as err:  # whatever odd content leads to: it is content, and another checkpoint may be sound
        problem = f"{store.url(checkpoint.path)}: {type(err).__name__}: {err}"
    barrier()  # reading may take one rank longer than a collective may
    if all_sum(torch.tensor([float(problem is not None)], device=device)) > 0:
        for fragment, old in zip(fragments, kept, strict=True):
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(old.tensors[kind])
        return Before(), problem or f"{store.url(checkpoint.path)}: another worker could not read its part"
    engine.restored(num_updates)
    forget(checkpoint.path)  # its copy of S3's files; all ranks have read theirs
    return before, None


def _index(manifest: dict[str, Any]) -> state.Index:
    return {name: [(int(s), int(n), str(file)) for s, n, file in places] for name, places in manifest["index"].items()}


def _written_until(store: Store, checkpoint: Checkpoint) -> Before:
    """Raises: Damaged where it is."""
    manifest = checkpoint.manifest
    names = [name for name in manifest["files"] if name in (METRICS, SAMPLES) or name.startswith(WORDS_PREFIX)]
    folder = checkpoints.fetch(store, checkpoint, names)
    lines = {name: (folder / name).read_text().splitlines(keepends=True) for name in names}
    meta = manifest["meta"]
    words = {name: found for name, found in lines.items() if name.startswith(WORDS_PREFIX)}
    return Before(
        lines.get(METRICS, []), lines.get(SAMPLES, []), words, {row: (name, place) for row, name, place in manifest["untaught"]},
        [*meta["resumed_from"], checkpoint.step], meta["wall_time_s"], meta["saving_s"],
    )  # fmt: skip


def _file_of(number: int) -> str:
    return f"rank-{number:05d}.safetensors"


def _note_of(number: int) -> str:
    return f"rank-{number:05d}.json"
