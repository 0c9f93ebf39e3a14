"""Is what `jobs/submit.py` sends small and described, and does its exit code say how the job ended? (Without a cluster.)"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpa_ray.cluster.submit import DONE, FAILED, STOPPED, Job, describe, follow, main
from dpa_ray.engine import stopping
from dpa_ray.recipe import RecipeError

ROOT = Path(__file__).resolve().parents[2]
LARGEST_BYTES = 10_000_000


def test_the_working_directory_that_ray_uploads_is_small_and_whole(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    logger = logging.getLogger("quiet")
    create_package(str(ROOT), package, include_gitignore=True, logger=logger)
    assert package.stat().st_size < LARGEST_BYTES
    names = set(zipfile.ZipFile(package).namelist())
    sources = {
        file.relative_to(ROOT).as_posix()
        for folder in ("dpa_ray", "jobs") for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }  # fmt: skip
    assert sources <= names, sorted(sources - names)
    assert not {name for name in names if name.startswith(("tests/", ".git/", "cluster/", ".ci/"))}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("true", {}),
        ("python jobs/sweep.py tiny", {}),
        ("python jobs/run_dpa.py", {"run": "tiny", "method": "dpa", "recipe": "tiny"}),
        ("python jobs/run_dpa.py tiny --name one --store s3://b/dpa",
         {"run": "one", "method": "dpa", "recipe": "tiny", "store": "s3://b/dpa"}),
        ("python jobs/run_dpa.py method=pmo --name=one", {"run": "one", "method": "pmo", "recipe": "tiny"}),
        ("python jobs/run_dpa.py jobs/recipes/tiny.yaml", {"run": "tiny", "method": "dpa", "recipe": "tiny.yaml"}),
        ("python jobs/run_dpa.py /only/on/the/head.yaml", {}),
        ("python jobs/run_dpa.py --no-such-flag", {}),
    ],
)  # fmt: skip
def test_the_main_jobs_run_is_its_metadata(command: str, expected: dict[str, str]) -> None:
    assert describe(command.split(), ROOT) == expected


def test_a_wrong_recipe_is_told_before_anything_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError):
        describe(["python", "jobs/run_dpa.py", "sed=1"], ROOT)
    code = main(
        ["--address", "http://127.0.0.1:1", "--working-dir", str(ROOT), "--", "python", "jobs/run_dpa.py", "sed=1"]
    )
    assert code == 2
    assert "sed: unknown key (did you mean seed?)" in capsys.readouterr().err


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--no-wait"])
    assert ended.value.code == 2
    assert "expected a command after --" in capsys.readouterr().err


class Client:
    """Stands for Ray's client of a job that has ended: its log comes in two parts, after `broken` attempts."""

    def __init__(self, status: str, code: int | None, broken: int = 0):
        self.status, self.code, self.broken = status, code, broken

    async def tail_job_logs(self, job: str) -> Any:
        yield "one\ntw"
        if self.broken:
            self.broken -= 1
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "o\nthree\n"

    def get_job_info(self, job: str) -> Any:
        status = SimpleNamespace(value=self.status, is_terminal=lambda: True)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=None)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, DONE), ("FAILED", 1, FAILED), ("FAILED", 2, 2), ("FAILED", 137, FAILED), ("FAILED", None, FAILED),
        ("STOPPED", None, STOPPED),
    ],
)  # fmt: skip
def test_the_exit_code_says_how_the_job_ended(status: str, code: int | None, expected: int) -> None:
    assert follow(Job(Client(status, code), "raysubmit_x", "http://head:8265")) == expected


def test_a_log_goes_on_where_its_connection_broke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpa_ray.cluster.submit.AGAIN_S", 0.0)
    assert follow(Job(Client("SUCCEEDED", 0, broken=2), "raysubmit_x", "http://head:8265")) == DONE
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_job_whose_log_never_comes_still_ends_and_the_problem_is_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpa_ray.cluster.submit.AGAIN_S", 0.0)
    assert follow(Job(Client("STOPPED", None, broken=10**6), "raysubmit_x", "http://head:8265")) == STOPPED
    assert capsys.readouterr().err.count("WebSocket connection closed unexpectedly") == 1


def test_submitting_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, dpa_ray.cluster.submit, dpa_ray.cluster.drain_watcher as w; print([m for m in ('torch', 'transformers') if m in sys.modules], 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


def test_sigterm_is_as_ctrl_c_and_a_second_one_does_not_cut_the_end_short() -> None:
    code = """
import os, signal, sys, time
from dpa_ray.engine.stopping import heed_sigterm
heed_sigterm()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except KeyboardInterrupt as err:
    os.kill(os.getpid(), signal.SIGTERM)
    print("tidy:", err)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tidy: ended by SIGTERM\n"


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"metadata": {}}', '{"metadata": {"job_submission_id": 5}}'])
def test_a_process_that_is_no_job_has_no_submission_id(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    assert stopping.submission_id() is None


def test_a_jobs_submission_id_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_x", "job_name": "raysubmit_x"}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    assert stopping.submission_id() == "raysubmit_x"
    assert "`ray job stop raysubmit_x` stops it" in stopping.hint("raysubmit_x")
