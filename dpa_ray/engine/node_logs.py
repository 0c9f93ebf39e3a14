"""What was said by a run's processes, when its cluster is gone? Their logs' ends, copied beside the run.

runs/<name>/logs/<when the job began>/driver.log         what the driver told, with times
runs/<name>/logs/<when the job began>/<address>/<file>   of each node: workers' output, Ray Train's, the raylet's

Copied when a stage ends, when workers are replaced, now and then at a checkpoint, and at the run's end. Of a node that is
lost, what was copied before stays. What looks like a secret is left out.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.credentials import without_credentials
from dpa_ray.engine import stopping
from dpa_ray.engine.messages import FAILED
from dpa_ray.store.fs import Store

FILE_BYTES = 512 * 1024
"""Of each file the end."""
NODE_FILES = 100
"""Of each node the files that were written last."""
DRIVER_LINES = 20_000
KEPT_ATTEMPTS = 5
EVERY_S = 300.0
"""So often at checkpoints."""
WITHIN_S = 30.0
"""So long other nodes are waited for."""
SKEW_S = 60.0
"""By which nodes' clocks may differ."""

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY(_|S?$)", re.IGNORECASE)
_SECRET_FORMS = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b|(?<=Bearer )[\w.~+/=-]{8,}")
_log = logging.getLogger(__name__)


def scrubbed(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of variables that are named like secrets, tokens of known forms, and passwords in addresses."""
    values = {v for name, v in environment.items() if _SECRET_NAMES.search(name) and len(v) >= 8}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return without_credentials(_SECRET_FORMS.sub("***", text))


def tail(file: Path, limit: int = FILE_BYTES) -> str:
    """The last `limit` bytes of a text file, from a line's beginning where it was cut, without secrets."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - limit))
        data = opened.read(limit)
    if size <= limit:
        return scrubbed(data.decode("utf-8", "replace"))
    whole = data.partition(b"\n")[2]  # half a line may be half a secret
    return f"[the first {size - len(whole):,} bytes are left out]\n{scrubbed(whole.decode('utf-8', 'replace'))}"


def chosen(folder: Path, job: str, submission: str | None, since_s: float = 0.0) -> list[Path]:
    """Files in Ray's log folder that tell of the job, written to after `since_s` (time.time), the latest first."""
    patterns = [f"worker-*-{job}-*.out", f"worker-*-{job}-*.err", "train/*.log", "raylet.out", "raylet.err"]
    patterns += [f"job-driver-{submission}.log"] if submission else []
    found = []
    for file in {file for pattern in patterns for file in folder.glob(pattern)}:
        try:
            status = file.stat()
        except OSError:  # Ray rotates its logs
            continue
        if status.st_size and status.st_mtime >= since_s:
            found.append((status.st_mtime, file))
    return [file for _, file in sorted(found, reverse=True)[:NODE_FILES]]


@dataclass(frozen=True)
class Node:
    """Where the logs of one job are on a node."""

    folder: Path
    address: str
    job: str  # Ray's id of it, in hex

    @classmethod
    def here(cls) -> Node:
        """Needs a process that has joined Ray."""
        import ray
        from ray._private.worker import _global_node

        assert _global_node is not None
        return cls(
            Path(_global_node.get_logs_dir_path()), _global_node.node_ip_address, ray.get_runtime_context().get_job_id()
        )

    def copy(self, store: Store, path: str, submission: str | None, since_s: float) -> None:
        """Copy what was written after `since_s` to `path`/<address>/."""
        place = f"{path}/{re.sub(r'[^0-9A-Za-z.-]', '_', self.address)}"
        for file in chosen(self.folder, self.job, submission, since_s):
            name = file.relative_to(self.folder).as_posix().replace("/", "_")
            store.write_bytes(f"{place}/{name}", tail(file).encode())


def copy_here(store: Store, path: str, since_s: float) -> None:
    """A task: copy the logs of the node that it runs on."""
    Node.here().copy(store, path, None, since_s)


def copy_elsewhere(store: Store, path: str, since_s: float) -> None:
    """Copy those of every other node that lives, by a task there; who does not answer in time is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():  # the run has left Ray, as where it gives up waiting: any call would start another one
        return
    own = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    copy = ray.remote(num_cpus=0, max_retries=0)(copy_here)
    tasks = [
        copy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(store, path, since_s)
        for node in others
    ]
    if not tasks:
        return
    done, late = ray.wait(tasks, num_returns=len(tasks), timeout=WITHIN_S)
    for task in late:
        ray.cancel(task, force=True)
    for task in done:
        try:
            ray.get(task)
        except Exception as err:  # of a node that goes, say
            _log.info("logs of a node were not copied: %s", err)


class NodeLogs(logging.Handler):
    """Keeps what the driver tells, and has logs copied as events come. Nothing that fails here disturbs the run."""

    def __init__(self, store: Store, run_path: str):
        super().__init__(logging.WARNING)
        self.store, self.all = store.brief(), f"{run_path}/logs"
        self.path = f"{self.all}/{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"
        self.lines: deque[str] = deque(maxlen=DRIVER_LINES)
        self.copied_s = 0.0  # everything written before is copied; by time.time
        self.busy = threading.Lock()
        self.node: Node | None = None  # from when Ray is there
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """What libraries warn of; still shown on the screen where no other handler does it."""
        self.tell(f"{record.levelname} {record.name}: {record.getMessage()}")
        if logging.lastResort is not None and not self._others(record.name):
            logging.lastResort.handle(record)

    def _others(self, name: str) -> bool:
        """Does another handler than this one get what logger `name` logs?"""
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False

    def tell(self, text: str) -> None:
        """A line of the driver's log."""
        self.lines.append(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")

    def joined(self) -> None:
        """Ray is there."""
        self.node = Node.here()

    def saw(self, kind: str, values: Mapping[str, Any]) -> None:
        """An event of the run."""
        if kind == "stage_finished":
            self.tell(f"{values['stage']} is finished")
        is_due = kind == "saved" and time.time() - self.copied_s >= EVERY_S
        if kind in ("stage_finished", FAILED) or is_due:
            threading.Thread(target=self._copy, kwargs={"everywhere": True}, daemon=True, name="node-logs").start()

    def ended(self, error: BaseException | None = None, *, begun: bool = True) -> None:
        """The run is over; of one that was not `begun` nothing is kept. Who interrupts it does not wait for other nodes."""
        logging.getLogger().removeHandler(self)
        if not begun:
            return
        is_interrupted = error is not None and not isinstance(error, Exception)
        if error is not None:
            self.tell(f"interrupted {error}" if is_interrupted else "".join(traceback.format_exception(error)))
        self._copy(everywhere=not is_interrupted, wait_s=0.0 if is_interrupted else WITHIN_S)

    def _copy(self, everywhere: bool, wait_s: float = 0.0) -> None:
        if not self.busy.acquire(timeout=wait_s):
            return
        since_s, self.copied_s = self.copied_s, time.time()
        try:
            self._copy_all(everywhere, max(0.0, since_s - SKEW_S))
        except Exception as err:  # the store's, Ray's, the disk's: of no matter to the run
            self.copied_s = since_s
            _log.info("logs were not copied: %s", err)
        finally:
            self.busy.release()

    def _copy_all(self, everywhere: bool, since_s: float) -> None:
        self.store.write_bytes(f"{self.path}/driver.log", scrubbed("".join(self.lines.copy())).encode())
        if since_s == 0.0:
            for old in self.store.list_dirs(self.all)[:-KEPT_ATTEMPTS]:
                self.store.delete(f"{self.all}/{old}")
        if self.node is not None:
            self.node.copy(self.store, self.path, stopping.submission_id(), since_s)
            if everywhere:
                copy_elsewhere(self.store, self.path, since_s)
