"""Do the trackers get every finite number, go on after a resume, and fail with words, not with the run?"""

from __future__ import annotations

import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from dpa_ray.errors import UserError
from dpa_ray.recipe_running import MlflowSection, TrackersSection, WandbSection
from dpa_ray.report.trackers import Status, Trackers, check

CONFIG = {"name": "tiny", "seed": 0, "stages": {"instruct": {"lr": 1e-3, "betas": [0.9, 0.999]}}}


def record(stage: str, step: int, loss: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": loss, "num_tokens": 7}


def run(section: TrackersSection, folder: Path, stage: str, steps: range, offset: float = 0.0) -> None:
    trackers = Trackers(section, folder, "tiny", "0123", CONFIG)
    for step in steps:
        trackers.log(stage, step, record(stage, step, step + offset))
    trackers.close()


def scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(e.step, e.value) for e in events.Scalars(key)]


def test_tensorboard_has_a_folder_per_stage_with_every_step(tmp_path: Path) -> None:
    trackers = Trackers(TrackersSection(), tmp_path, "tiny", "0123", CONFIG)
    for stage in ("proxy_llm", "instruct"):
        for step in (1, 2, 3):
            trackers.log(stage, step, record(stage, step, step / 2))
    trackers.close()
    for stage in ("proxy_llm", "instruct"):
        assert scalars(tmp_path / "tensorboard" / stage, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
        assert scalars(tmp_path / "tensorboard" / stage, "num_tokens") == [(1, 7), (2, 7), (3, 7)]


def test_a_resumed_stage_replaces_the_points_after_its_checkpoint(tmp_path: Path) -> None:
    run(TrackersSection(), tmp_path, "instruct", range(1, 6))
    run(TrackersSection(), tmp_path, "instruct", range(4, 7), offset=100)
    assert scalars(tmp_path / "tensorboard/instruct", "loss") == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106)]


def test_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    trackers = Trackers(TrackersSection(), tmp_path, "tiny", "0123", CONFIG)
    extra = {"bad": float("nan"), "none": None, "reused": True, "word": "x", "good": 1.5}
    trackers.log("instruct", 1, {**record("instruct", 1, float("inf")), **extra})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard/instruct")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["good", "num_tokens"]


def test_all_off_writes_nothing(tmp_path: Path) -> None:
    run(TrackersSection(tensorboard=False), tmp_path, "instruct", range(1, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail, as if it were not there
    section = TrackersSection.model_validate(
        {"wandb": {"project": "p"}} if name == "wandb" else {"mlflow": {"tracking_uri": "u"}}
    )
    with pytest.raises(
        UserError, match=rf"trackers\.{name}: expected the package {name}.*pip install -e '\.\[{name}\]'"
    ):
        check(section)


def test_what_is_off_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    check(TrackersSection())


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """W&B reads its environment once per process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_works_offline_and_keeps_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    section = TrackersSection(tensorboard=False, wandb=WandbSection(project="p"))
    check(section)
    run(section, tmp_path, "instruct", range(1, 4))
    wandb.teardown()  # as at the process's end: W&B's own process closes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert _wandb_history(file) == [
        {"instruct/step": s, "instruct/loss": s, "instruct/num_tokens": 7} for s in (1, 2, 3)
    ]


def _wandb_history(file: Path) -> list[dict[str, float]]:
    """The logged rows of a .wandb file: 7 bytes of header, then (crc, length, type) and a protobuf message each."""
    data, at, rows = file.read_bytes(), 7, []
    assert len(data) < 32768, "LevelDB's log format cuts records at blocks; this reads one block only"
    while at < len(data):
        _, size, _ = struct.unpack_from("<IHB", data, at)
        at += 7
        items = Record.FromString(data[at : at + size]).history.item
        at += size
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        if row:
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_without_a_key_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the machine's user
    with pytest.raises(UserError, match=r"trackers\.wandb: .*WANDB_API_KEY.*WANDB_MODE=offline"):
        check(TrackersSection(wandb=WandbSection(project="p")))


@pytest.fixture
def mlflow_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackersSection:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs this since MLflow 3; a server does not
    return TrackersSection(tensorboard=False, mlflow=MlflowSection(tracking_uri=f"file://{tmp_path}/mlruns"))


def test_mlflow_gets_metrics_and_the_recipe_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, mlflow_section: TrackersSection
) -> None:
    check(mlflow_section)
    run(mlflow_section, tmp_path, "proxy_mllm", range(1, 3))
    run(mlflow_section, tmp_path, "instruct", range(1, 3))
    client = MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    (found,) = client.search_runs([client.get_experiment_by_name("dpa_ray").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "tiny"
    assert found.data.params["stages.instruct.betas"] == "[0.9, 0.999]"
    for stage in ("proxy_mllm", "instruct"):
        history = client.get_metric_history(found.info.run_id, f"{stage}/loss")
        assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(("ended", "status"), [("failed", "FAILED"), ("stopped", "KILLED"), ("done", "FINISHED")])
def test_mlflow_says_how_a_run_ended_and_goes_on_with_it(
    ended: Status, status: str, tmp_path: Path, mlflow_section: TrackersSection
) -> None:
    """With another number of workers it is the same run still."""
    for workers in (1, 2):
        config = {**CONFIG, "cluster": {"workers": workers}}
        trackers = Trackers(mlflow_section, tmp_path, "tiny", "0123", config)
        trackers.log("instruct", workers, record("instruct", workers, 1.0))
        trackers.close(ended)
        client = MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
        (found,) = client.search_runs([client.get_experiment_by_name("dpa_ray").experiment_id])
        assert found.info.status == status
    assert len(client.get_metric_history(found.info.run_id, "instruct/loss")) == 2


def test_the_runs_of_a_sweep_carry_its_name(tmp_path: Path, mlflow_section: TrackersSection) -> None:
    for name, group in (("s-0000", "s"), ("s-0001", "s"), ("alone", None)):
        trackers = Trackers(mlflow_section, tmp_path, name, "0123", CONFIG, group)
        trackers.log("instruct", 1, record("instruct", 1, 1.0))
        trackers.close()
    client = MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    place = client.get_experiment_by_name("dpa_ray").experiment_id
    found = client.search_runs([place], "tags.`dpa_ray.sweep` = 's'")
    assert sorted(run.info.run_name for run in found) == ["s-0000", "s-0001"]


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_groups_the_runs_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    section = TrackersSection(tensorboard=False, wandb=WandbSection(project="p"))
    trackers = Trackers(section, tmp_path, "s-0000", "0123", CONFIG, "s")
    assert wandb.run is not None
    assert wandb.run.group == "s"
    trackers.close()


def test_mlflow_that_does_not_answer_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    section = TrackersSection(mlflow=MlflowSection(tracking_uri="http://127.0.0.1:9"))
    with pytest.raises(
        UserError, match=r"trackers\.mlflow: http://127\.0\.0\.1:9, experiment dpa_ray, cannot be logged to"
    ):
        Trackers(section, tmp_path, "tiny", "0123", CONFIG)


def test_a_tracker_that_fails_on_the_way_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(TrackersSection(), tmp_path, "tiny", "0123", CONFIG)
    (tmp_path / "tensorboard").write_text("a file where the folder should go")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            trackers.log("instruct", step, record("instruct", step, 1.0))
        trackers.close()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("dpa_ray")]
    assert message.startswith("trackers.tensorboard failed and is left out from here on:")
