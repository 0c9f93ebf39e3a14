"""What is in metrics.jsonl? Exactly one line per (stage, step), in stage order, whatever was killed and resumed."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from dpa_ray.errors import UserError

FILE = "metrics.jsonl"

Record = dict[str, Any]


class Files(Protocol):
    """What is asked of a store (`dpa_ray.store.fs.Store`)."""

    @property
    def is_local(self) -> bool: ...

    def url(self, path: str) -> str: ...
    def exists(self, path: str) -> bool: ...
    def read_bytes(self, path: str) -> bytes: ...
    def write_bytes(self, path: str, data: bytes) -> None: ...
    def append_line(self, path: str, line: str) -> None: ...


class MetricsLog:
    """The metrics of a run under way; one process writes them.

    A local store gets each line as it comes; while its disk is full, lines are kept, and follow when there is room. S3
    cannot append: there the whole is written at `flush`, which belongs at every checkpoint, before it counts, and at a
    stage's end. `append` and `flush` may be called by two threads, and a `flush` that waits for S3 holds up no `append`.

    The stage under way is always last in the file. A run passes through all its stages in order, each by `start` or
    by `copy_reused`, so that at its end the file is in stage order, whatever an earlier attempt had left.
    """

    def __init__(self, store: Files, run_path: str, note: Callable[[str], None] = lambda text: None):
        """`note` is told, once, that lines cannot be written now."""
        self.store = store
        self.note = note
        self.path = f"{run_path}/{FILE}"
        self.run_path = run_path
        self._lines: list[str] = []  # what the file will hold once written whole
        self._waiting: list[str] = []  # local: lines that could not be appended
        self._lines_lock, self._file_lock = threading.Lock(), threading.Lock()
        self._stage: str | None = None
        self._step = 0

    def start(self, stage: str, done: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin `stage`, or go on after the steps `done`: they take the place of what the file has of it."""
        others = [record for record in read(self.store, self.run_path) if record["stage"] != stage]
        self._lines = [_line(record) for record in (*others, *done)]
        self._stage, self._step = stage, len(done)
        self._write()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one optimizer step of the stage under way; a number that is not finite is written as null."""
        stage, step = record["stage"], record["step"]
        assert (stage, step) == (self._stage, self._step + 1), f"{stage} {step} after {self._stage} {self._step}"
        line = _line(record)
        self._step = step
        if not self.store.is_local:
            with self._lines_lock:
                self._lines.append(line)
            return
        with self._file_lock:
            first = not self._waiting
            self._waiting.append(line)
            try:
                self._append_waiting()
            except (UserError, OSError) as err:
                if first:
                    self.note(f"{err}; training goes on, and metrics are written as soon as they can be")

    def flush(self) -> None:
        """Make every line so far durable. Raises: what the store raises."""
        if not self.store.is_local:
            self._write()
            return
        with self._file_lock:
            self._append_waiting()

    def _append_waiting(self) -> None:
        while self._waiting:
            self.store.append_line(self.path, self._waiting[0])
            del self._waiting[0]

    @staticmethod
    def copy_reused(store: Files, run_path: str, stage: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Put the lines of a stage that is reused, marked `"reused": true`, in place of what the file has of it."""
        log = MetricsLog(store, run_path)
        others = [r for r in read(store, run_path) if r["stage"] != stage]
        log._lines = [_line(r) for r in [*others, *({**r, "stage": stage, "reused": True} for r in lines)]]
        log._write()

    def _write(self) -> None:
        with self._file_lock:  # what is written later is never older
            with self._lines_lock:
                content = "".join(line + "\n" for line in self._lines)
            self.store.write_bytes(self.path, content.encode())


def read(store: Files, run_path: str) -> list[Record]:
    """The records of a run, in the file's order; [] where there are none yet. NaN and infinities come back as None.

    A last line that was cut (its process was killed) is left out.
    Raises: UserError where another line is not a record.
    """
    path = f"{run_path}/{FILE}"
    if not store.exists(path):
        return []
    records: list[Record] = []
    lines = store.read_bytes(path).split(b"\n")
    last = len(lines) - 1 if lines[-1] else len(lines) - 2
    for i, line in enumerate(lines[: last + 1]):
        try:
            record = json.loads(line)
            valid = isinstance(record, dict) and isinstance(record["stage"], str) and isinstance(record["step"], int)
        except (ValueError, KeyError, RecursionError):
            valid = False
        if valid:
            records.append(record)
        elif i < last:
            where = f"{store.url(path)}, line {i + 1}"
            raise UserError(
                f"{where}: expected a JSON object with stage and step, found {_shown(line)}; mend or delete it"
            )
    return records


def _shown(line: bytes) -> str:
    text = repr(line.decode(errors="replace"))
    return text if len(text) <= 60 else text[:57] + "..."


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    """The value in JSON's types; scalars of numpy and torch as numbers, NaN and infinities (JSON has none) as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
