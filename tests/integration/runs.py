"""How the tests run the product: recipes as YAML files, `python jobs/run_dpa.py` as a subprocess, results as files."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_models import LlavaData

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("proxy_llm", "proxy_mllm", "instruct")

# One thread each, nothing from a hub, and never into a Ray cluster or a cache that happens to be there.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}
UNSET = ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_PROFILE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTEST_CURRENT_TEST")


@dataclass(frozen=True)
class Run:
    """A finished command: its exit code, what it printed, and where its files are (local stores)."""

    returncode: int
    stdout: str
    stderr: str
    store: Path
    name: str
    recipe: dict[str, Any]

    @property
    def output(self) -> str:
        """Both streams, for assertions' messages."""
        return f"exit {self.returncode}\n--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"

    @property
    def folder(self) -> Path:
        return self.store / "runs" / self.name

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def info(self) -> dict[str, Any]:
        """run.json."""
        return json.loads((self.folder / "run.json").read_text())

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one stage, in order; of a run that was killed, without one that was cut."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]]
        return [line for line in lines if line["stage"] == stage]

    def samples(self, stage: str) -> dict[int, list[str]]:
        """The ids of the samples that each step of a stage took (needs debug.record_samples)."""
        lines = [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]
        return {line["step"]: line["ids"] for line in lines if line["stage"] == stage}

    def artifact(self, stage: str) -> Path:
        """The folder of a stage's artifact (a stage as recipes write it: proxy_llm)."""
        return artifact(self.store, stage)


def artifact(store: Path, stage: str) -> Path:
    """The only committed artifact of a stage in a store."""
    (manifest,) = (store / "artifacts").glob(f"{stage.replace('_', '-')}-*/manifest.json")
    return manifest.parent


def make_recipe(
    llm: Path | str,
    vision: Path | str,
    pretrain: LlavaData,
    instruct: LlavaData,
    *,
    method: str = "dpa",
    **changes: Any,
) -> dict[str, Any]:
    """A fast fp32 recipe on one CPU worker: stage 1 trains, stages 2 and 3 measure (lr 0).

    `changes` are overrides by path with "__" for ".": `stages__instruct__lr=1e-3`.
    """
    stage = {"global_batch_size": 4, "micro_batch_size": 2, "max_length": 150, "gradient_checkpointing": False}
    recipe: dict[str, Any] = {
        "method": method,
        "model": {"llm": str(llm), "vision": str(vision), "vision_layer": -2},
        "data": {
            "pretrain": {"source": str(pretrain.file), "images": str(pretrain.images), "format": "llava"},
            "instruct": {"source": str(instruct.file), "images": str(instruct.images), "format": "llava"},
            "workers": 1,
        },
        "stages": {
            "proxy_llm": {**stage, "lr": 2.0e-2, "lora": {"rank": 8, "alpha": 16}},
            "proxy_mllm": {**stage, "lr": 0.0},
            "instruct": {**stage, "lr": 0.0},
        },
        "precision": "fp32",
        "cluster": {"workers": 1, "gpus_per_worker": 0},
        "trackers": {"tensorboard": False},
        "debug": {"record_samples": True},
        "seed": 3,
    }
    return changed(recipe, **changes)


def changed(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `recipe` with values replaced by path, "__" for "."."""
    recipe = copy.deepcopy(recipe)
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = recipe
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = value
    return recipe


def run_dpa(
    recipe: dict[str, Any] | Path,
    store: Path | str,
    name: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    timeout_s: float = 400,
    folder: Path | None = None,
) -> Run:
    """Run `python jobs/run_dpa.py RECIPE ... --store STORE --name NAME` and wait for it.

    The recipe's YAML goes to `folder` (beside a local store by default). A command that exceeds `timeout_s` is ended
    with all that it started, and fails the test with what it had printed.
    """
    running = start_dpa(recipe, store, name, *arguments, env=env, folder=folder)
    return running.finished(timeout_s)


@dataclass
class Running:
    """A command under way, to be watched and hurt. All that it starts carries a mark in its environment."""

    process: subprocess.Popen[str]
    mark: str
    run: Run  # without its result

    def finished(self, timeout_s: float = 400) -> Run:
        """Wait for its end. One that takes longer is ended with all that it started, and fails the test."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            stdout, stderr = self.process.communicate()
            raise AssertionError(f"no end after {timeout_s} s: {stdout[-6000:]}\n{stderr[-6000:]}") from None
        return dataclasses.replace(self.run, returncode=self.process.returncode, stdout=stdout, stderr=stderr)

    def wait_for(self, stage: str, step: int, timeout_s: float = 200) -> None:
        """Until metrics.jsonl has this step."""
        until = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < until:
            if (self.run.folder / "metrics.jsonl").exists():
                lines = (self.run.folder / "metrics.jsonl").read_text().split("\n")[:-1]
                if any((r["stage"], r["step"]) == (stage, step) for r in map(json.loads, lines)):
                    return
            time.sleep(0.02)
        stdout, stderr = self.process.communicate(timeout=60) if self.process.poll() is not None else ("", "")
        raise AssertionError(f"{stage} step {step} never came: {stdout[-6000:]}\n{stderr[-6000:]}")

    def processes(self, title: str) -> list[int]:
        """Those of this command whose command line has `title` in it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = self.mark.encode() in (folder / "environ").read_bytes()
                if is_ours and title.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return sorted(found)

    def wait_for_process(self, title: str, timeout_s: float = 120) -> list[int]:
        """`processes(title)`, once there are some."""
        until = time.monotonic() + timeout_s
        while not (found := self.processes(title)):
            assert time.monotonic() < until, f"no {title} after {timeout_s} s"
            time.sleep(0.05)
        return found

    def wait_for_end_of(self, title: str, timeout_s: float = 60) -> None:
        """Until no process of this command has `title` in its command line: what was told to end needs a moment."""
        until = time.monotonic() + timeout_s
        while left := self.processes(title):
            assert time.monotonic() < until, f"{title} still there after {timeout_s} s: {left}"
            time.sleep(0.1)

    def kill_worker(self, number: int = 0) -> None:
        """SIGKILL to one training worker."""
        os.kill(self.processes("ray::RayTrainWorker")[number], signal.SIGKILL)

    def kill_all(self) -> Run:
        """SIGKILL to the command, its workers and all of its local Ray at once, as when a machine goes down."""
        for title in ("ray::RayTrainWorker", "run_dpa.py", ""):
            for pid in self.processes(title):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.finished(60)


def _heed_ctrl_c() -> None:
    """Shells let what they start in the background ignore it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_dpa(
    recipe: dict[str, Any] | Path,
    store: Path | str,
    name: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    folder: Path | None = None,
    job: str = "run_dpa.py",
    prefix: Sequence[str] = (),
) -> Running:
    """Start `python jobs/JOB RECIPE ... --store STORE --name NAME`, as `run_dpa` does; `prefix` is a command that runs it."""
    local = Path(store) if "://" not in str(store) else None
    folder = folder or (local.parent if local else Path(ROOT))
    file = recipe if isinstance(recipe, Path) else folder / f"{name}.yaml"
    values = {} if isinstance(recipe, Path) else recipe
    if not isinstance(recipe, Path):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe))
    command = [*prefix, sys.executable, f"jobs/{job}", str(file), *arguments, "--store", str(store), "--name", name]
    mark = f"DPA_RAY_TEST_MARK={uuid.uuid4().hex}"
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {"DPA_RAY_CACHE": str(folder / "cache"), **ENVIRONMENT, **(env or {})}
    environment |= dict([mark.split("=")])
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=_heed_ctrl_c,
    )  # fmt: skip
    return Running(process, mark, Run(0, "", "", local or Path(), name, values))


def losses(run: Run, stage: str, key: str = "loss") -> list[float]:
    """One metric of a stage, step by step."""
    return [line[key] for line in run.metrics(stage)]


def tree(folder: Path) -> Sequence[str]:
    """Every file under `folder`, relative, with its size: what changed between two moments."""
    return sorted(f"{p.relative_to(folder)} {p.stat().st_size}" for p in folder.rglob("*") if p.is_file())
