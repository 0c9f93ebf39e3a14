"""Is there a report after a run, does the command make one of runs and sweeps, and does it say what is wrong?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpa_ray.engine import words
from jobs import report
from tests.integration.runs import Run
from tests.report_data import sweep


def test_a_run_leaves_its_report_with_the_weights_of_its_words(measured: Run) -> None:
    text = (measured.folder / "report.html").read_text()
    assert "Run measured" in text
    assert measured.stdout.count("report.html") == 1
    for stage in ("proxy_mllm", "instruct"):
        lines = (measured.artifact(stage) / "examples.jsonl").read_text().splitlines()
        assert len(lines) == 8
        for line in lines:
            example = json.loads(line)
            weights = [weight for _, weight, _, _ in example["tokens"] if weight is not None]
            assert all(0.05 <= weight <= 0.5 for weight in weights)
            assert weights or stage == "instruct", "every caption has targets"
    for stage in ("proxy_llm", "proxy_mllm", "instruct"):
        about, rows = words.read(measured.artifact(stage) / words.FILE)
        num_samples = int(about["num_samples"])
        assert 0 < num_samples <= words.MAX_SAMPLES
        assert about["samples"] == words.TRAINING, "nothing is held out"
        assert sum(row["count"] for row in rows) >= num_samples
        gains = [row["gain"] for row in rows]
        assert any(gains) == (stage != "proxy_llm")
        before, after = ([row[f"nll_{when}"] for row in rows] for when in ("before", "after"))
        assert (after == pytest.approx(before, rel=1e-5)) == (stage != "proxy_llm"), "the others only measure"
    kept = {"examples.jsonl", words.FILE} & {file.name for file in measured.model.iterdir()}
    assert not kept, "no part of the model"


def test_the_command_of_one_of_several_and_of_a_sweep(
    measured: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(measured.folder), "--output", str(tmp_path / "one.html")]) == 0
    assert (tmp_path / "one.html").read_text() == (measured.folder / "report.html").read_text()
    assert report.main([*[str(measured.folder)] * 2, "--output", str(tmp_path / "twice.html")]) == 0
    assert (tmp_path / "twice.html").read_text() == (tmp_path / "one.html").read_text()
    shutil.copytree(measured.folder, tmp_path / "store/runs/other")
    monkeypatch.chdir(tmp_path)
    assert report.main([str(measured.folder), f"{tmp_path}/store/runs/other/"]) == 0
    assert "2 runs" in (tmp_path / "report.html").read_text()
    folder = tmp_path / "store/sweeps/ranks"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(sweep()))
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "Sweep ranks" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{store}/runs/nobody"], 2, "runs/nobody/run.json, found no such file"),
        (["{store}/artifacts/x"], 2, "expected a run or a sweep, STORE/runs/NAME or STORE/sweeps/NAME"),
        (["ftp://bucket/runs/a"], 2, "expected an absolute local path, s3://"),
        (["{run}", "{store}/sweeps/broken"], 2, "expected runs, or one sweep"),
        (["{store}/sweeps/broken"], 1, "sweeps/broken/sweep.json"),
        (["{run}", "--output", "{store}"], 1, "Is a directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(
    arguments: list[str], code: int, words: str, measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "sweeps/broken/sweep.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("[1")
    assert report.main([a.format(store=tmp_path, run=measured.folder) for a in arguments]) == code
    assert words in capsys.readouterr().err
