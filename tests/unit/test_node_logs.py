"""Are the logs that stay with a run the right ones, bounded, and without secrets?"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpa_ray.engine import node_logs
from dpa_ray.engine.node_logs import Node, NodeLogs, chosen, scrubbed, tail
from dpa_ray.store.fs import Store

ROOT = Path(__file__).resolve().parents[2]
JOB = "01000000"
SECRET = "s3cr3t-value-of-a-key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Ray's: of this job, of another, of no job; empty files too."""
    made = tmp_path / "logs"
    (made / "train").mkdir(parents=True)
    for name, text in {
        f"worker-aa-{JOB}-11.out": "step 1\n", f"worker-aa-{JOB}-11.err": "", "worker-bb-02000000-12.out": "another's\n",
        "raylet.out": "raylet\n", "gcs_server.out": "gcs\n", "train/ray-train-app-worker-aa.log": "train\n",
        "job-driver-raysubmit_x.log": "driver\n", "job-driver-raysubmit_y.log": "another driver\n",
    }.items():  # fmt: skip
        (made / name).write_text(text)
    return made


def test_a_jobs_own_files_are_chosen(folder: Path) -> None:
    names = {file.name for file in chosen(folder, JOB, "raysubmit_x")}
    assert names == {
        f"worker-aa-{JOB}-11.out",
        "raylet.out",
        "ray-train-app-worker-aa.log",
        "job-driver-raysubmit_x.log",
    }
    assert not {file for file in chosen(folder, JOB, None) if file.name.startswith("job-driver")}


def test_what_was_not_written_to_since_is_left(folder: Path) -> None:
    file = folder / "raylet.out"
    os.utime(file, (1000, 1000))
    assert file in chosen(folder, JOB, None, since_s=1000)
    assert file not in chosen(folder, JOB, None, since_s=1001)


def test_the_files_written_last_stay_where_there_are_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_logs, "NODE_FILES", 2)
    for number, name in enumerate(["raylet.out", f"worker-aa-{JOB}-11.out", "train/ray-train-app-worker-aa.log"]):
        os.utime(folder / name, (1000 + number, 1000 + number))
    assert [file.name for file in chosen(folder, JOB, None)] == [
        "ray-train-app-worker-aa.log",
        f"worker-aa-{JOB}-11.out",
    ]


def test_of_a_long_file_the_end_is_kept_from_a_line_on(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"line {number:04}\n" for number in range(1000)))  # 10 bytes each
    kept = tail(file, limit=25)
    assert kept == "[the first 9,980 bytes are left out]\nline 0998\nline 0999\n"
    assert tail(file, limit=10_000) == file.read_text()


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff\xfe progress \x80\n")
    assert "progress" in tail(tmp_path / "log")


@pytest.mark.parametrize(
    "text",
    [
        f"key={SECRET}", "logged in with hf_abcdefghijklmnop1234", "id AKIAABCDEFGHIJKLMNOP",
        "Authorization: Bearer abc.def-ghi", "http://user:hunter22@example.org/x",
    ],
)  # fmt: skip
def test_secrets_are_left_out(text: str) -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET, "HOME": "/home/of/nobody"}
    kept = scrubbed(text, environment)
    assert "***" in kept
    for secret in (SECRET, "hf_abcdefghijklmnop1234", "AKIAABCDEFGHIJKLMNOP", "abc.def-ghi", "hunter22"):
        assert secret not in kept


def test_what_is_no_secret_stays() -> None:
    text = "monkey business at /home/of/nobody, 12345678 tokens, key 1"
    assert scrubbed(text, {"HOME": "/home/of/nobody", "KEYBOARD": "business", "TOKEN_COUNT": "1"}) == text


def test_a_run_keeps_its_drivers_lines_and_its_nodes_files(folder: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    logs = NodeLogs(store, "runs/one")
    logs.node = Node(folder, "fd00::1", JOB)
    logs.tell("the first note")
    logging.getLogger("a.library").warning("it warns of %s", "something")
    logs._copy(everywhere=False)
    logs.ended(KeyboardInterrupt("ended by SIGTERM"))
    driver = store.read_bytes(f"{logs.path}/driver.log").decode()
    assert "Z the first note\n" in driver
    assert "WARNING a.library: it warns of something" in driver
    assert "interrupted ended by SIGTERM" in driver
    assert store.list(f"{logs.path}/fd00__1") == [
        "raylet.out", "train_ray-train-app-worker-aa.log", f"worker-aa-{JOB}-11.out"
    ]  # fmt: skip
    assert logs not in logging.getLogger().handlers


def test_warnings_are_still_shown_once(tmp_path: Path) -> None:
    code = f"""
import logging
from dpa_ray.engine.node_logs import NodeLogs
from dpa_ray.store.fs import Store
NodeLogs(Store({str(tmp_path / "store")!r}), "runs/one")
logging.getLogger("plain").warning("by nobody else")
own = logging.getLogger("own")
own.addHandler(logging.StreamHandler())
own.warning("by its own handler")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["by nobody else", "by its own handler"]


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    NodeLogs(store, "runs/one").ended(ValueError("no"), begun=False)
    assert not (tmp_path / "store").exists()


def test_the_logs_of_the_last_attempts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    for day in range(1, 9):
        store.write_bytes(f"runs/one/logs/2001010{day}T000000Z/driver.log", b"old")
    NodeLogs(store, "runs/one").ended()
    left = store.list_dirs("runs/one/logs")
    assert len(left) == node_logs.KEPT_ATTEMPTS
    assert left[0] == "20010105T000000Z"


def test_a_store_that_refuses_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, where a folder should be")
    NodeLogs(Store(str(tmp_path / "store")), "runs/one").ended(ValueError("the run's own"))


def test_no_ray_is_started_to_copy_logs_where_the_run_has_left_it(tmp_path: Path) -> None:
    code = f"""
import ray
from dpa_ray.engine.node_logs import copy_elsewhere
from dpa_ray.store.fs import Store
copy_elsewhere(Store({str(tmp_path)!r}), "logs", 0.0)
print(ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
