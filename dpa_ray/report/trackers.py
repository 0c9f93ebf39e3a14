"""Where else do the metrics go? TensorBoard, W&B and MLflow, each by a recipe switch, behind one small class."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from dpa_ray.errors import UserError
from dpa_ray.recipe_running import MlflowSection, TrackersSection, WandbSection

LOG = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_BATCH = 900
"""MLflow takes at most 1,000 metrics at a time."""
MLFLOW_EVERY_S = 5.0
MLFLOW_TAG = "dpa_ray.run"
MLFLOW_GROUP_TAG = "dpa_ray.sweep"


def check(section: TrackersSection) -> None:
    """Look whether what the recipe switches on can be used, before anything is started.

    Raises: UserError that names the package to install, or what W&B misses.
    """
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(section, name) is None:
            continue
        try:
            importlib.import_module(package)
        except ImportError as err:
            raise UserError(
                f"trackers.{name}: expected the package {package}, found none ({err}); "
                f"pip install -e '.[{name}]', or trackers.{name}=null"
            ) from None
    if section.wandb is not None:
        import wandb

        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            wandb.login(verify=False)  # looks for a key, asks for it at a terminal
        except wandb.Error as err:
            raise UserError(
                f"trackers.wandb: {_first_line(err)} Set WANDB_API_KEY, or WANDB_MODE=offline to write to disk only"
            ) from None


Status = Literal["done", "failed", "stopped"]
"""How a run ended, or why it goes on later."""


class Tracker(Protocol):
    """One place that metrics go to."""

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None: ...
    def close(self, status: Status) -> None: ...


class Trackers:
    """All places that a recipe's `trackers` names. One process uses it: the one that writes metrics.jsonl.

    A run is found again by its name and what it is, so that a resumed one goes on where it was. A place that fails on the
    way is left out with a warning: a training run does not die of its dashboard, and metrics.jsonl has every line.
    """

    def __init__(
        self,
        section: TrackersSection,
        run_dir: Path,
        run_name: str,
        identity: str,
        config: Mapping[str, Any],
        group: str | None = None,
    ):
        """`run_dir`: a local folder that TensorBoard's and W&B's files go to; `identity`: what the run is, whatever changes in
        how it is done; `config`: the resolved recipe; `group`: the sweep that the run belongs to (W&B's group, MLflow's
        tag dpa_ray.sweep).

        Raises: UserError where a tracker cannot be started.
        """
        run_id = f"{run_name}-{identity}"
        self._trackers: dict[str, Tracker] = {}
        if section.tensorboard:
            self._trackers["tensorboard"] = _TensorBoard(run_dir / TENSORBOARD_FOLDER)
        if section.wandb is not None:
            self._trackers["wandb"] = _Wandb(section.wandb, run_dir, run_name, run_id, config, group)
        if section.mlflow is not None:
            self._trackers["mlflow"] = _Mlflow(section.mlflow, run_name, run_id, config, group)

    def log(self, stage: str, step: int, record: Mapping[str, Any]) -> None:
        """Send the finite numbers of one optimizer step; `step` counts from 1 in each stage."""
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key not in ("step", "stage") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self._each("log", stage, step, numbers)

    def close(self, status: Status = "done") -> None:
        """Send what is still held back, and end."""
        self._each("close", status)
        self._trackers = {}

    def _each(self, method: str, *args: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as err:  # each service has errors of its own
                del self._trackers[name]
                LOG.warning("trackers.%s failed and is left out from here on: %s", name, _first_line(err))


class _TensorBoard:
    """Event files, one folder (TensorBoard's "run") per stage, so that the stages' curves lie over each other."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        if stage not in self.writers:
            from tensorboardX import SummaryWriter

            # purge_step: readers drop what an attempt before this one wrote after its checkpoint
            self.writers[stage] = SummaryWriter(
                str(self.folder / stage), purge_step=step, filename_suffix=f".from-{step}", flush_secs=10
            )
        for key, value in numbers.items():
            self.writers[stage].add_scalar(key, value, step)

    def close(self, status: Status) -> None:
        for writer in self.writers.values():
            writer.close()


class _Wandb:
    """One W&B run; each stage has its own step axis. WANDB_MODE=offline keeps it on disk."""

    def __init__(
        self,
        section: WandbSection,
        run_dir: Path,
        run_name: str,
        run_id: str,
        config: Mapping[str, Any],
        group: str | None,
    ):
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        self.stages: set[str] = set()
        try:
            self.run = wandb.init(
                project=section.project,
                entity=section.entity,
                name=run_name,
                group=group,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as err:
            raise UserError(
                f"trackers.wandb: project {section.project} cannot be logged to: {_first_line(err)}"
            ) from None

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in numbers.items()}})

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "done" else 1)


class _Mlflow:
    """One MLflow run, found again by a tag. Metrics go in batches: a request a step would slow training."""

    def __init__(
        self, section: MlflowSection, run_name: str, run_id: str, config: Mapping[str, Any], group: str | None
    ):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 by default: minutes until an error shows
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at each stage's end otherwise
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.held: list[Any] = []
        self.sent = time.monotonic()
        try:
            self.client = MlflowClient(tracking_uri=section.tracking_uri)
            experiment = self.client.get_experiment_by_name(section.experiment)
            place = experiment.experiment_id if experiment else self.client.create_experiment(section.experiment)
            found = self.client.search_runs([place], f"tags.`{MLFLOW_TAG}` = '{run_id}'", max_results=1)
            if found:
                self.run_id = found[0].info.run_id
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                tags = {MLFLOW_TAG: run_id} | ({} if group is None else {MLFLOW_GROUP_TAG: group})
                self.run_id = self.client.create_run(place, run_name=run_name, tags=tags).info.run_id
                params = [Param(key, value[:500]) for key, value in _flat(config).items()]
                for first in range(0, len(params), 100):  # MLflow's limit for one request
                    self.client.log_batch(self.run_id, params=params[first : first + 100])
        except Exception as err:
            raise UserError(
                f"trackers.mlflow: {section.tracking_uri}, experiment {section.experiment}, "
                f"cannot be logged to: {_first_line(err)}"
            ) from None

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self.held += [Metric(f"{stage}/{key}", value, now_ms, step) for key, value in numbers.items()]
        if len(self.held) >= MLFLOW_BATCH or time.monotonic() - self.sent >= MLFLOW_EVERY_S:
            self._send()

    def close(self, status: Status) -> None:
        self._send()
        self.client.set_terminated(self.run_id, {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status])

    def _send(self) -> None:
        for first in range(0, len(self.held), MLFLOW_BATCH):
            self.client.log_batch(self.run_id, metrics=self.held[first : first + MLFLOW_BATCH])
        self.held, self.sent = [], time.monotonic()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as `key.path`: value, as overrides are written."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
