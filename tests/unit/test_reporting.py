"""Is a report made of whatever can still be read, and does it say what could not, and why?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpa_ray.data.prepare import prepare
from dpa_ray.engine import examples, words
from dpa_ray.engine.evaluate import ANSWERS
from dpa_ray.engine.reporting import Place, gather, page, write_report
from dpa_ray.errors import NoAnswer
from dpa_ray.recipe import SourceSection
from dpa_ray.report.content import RunData
from dpa_ray.store.artifacts import commit
from dpa_ray.store.fs import Store
from tests.report_data import record, run_data, words_of
from tests.tiny_models import make_captions

PARTS = ("metrics", "examples", "words", "answers", "pictures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with one finished run, `one`, of which everything is there."""
    store = Store(str(tmp_path / "store"))
    captions = make_captions(tmp_path / "captions", 3)
    source = SourceSection(source=str(captions.file), images=str(captions.images))
    digest = prepare(store, source, max_quarantined_fraction=0).digest
    made = run_data()
    files = {
        "instruct": {examples.FILE: made.examples["instruct"]},
        "eval": {ANSWERS: [{**answer, "set": "heldout"} for answer in made.answers]},
    }
    told = {}
    for stage, lines in files.items():
        local = tmp_path / stage
        local.mkdir()
        for name, values in lines.items():
            (local / name).write_text("".join(json.dumps(value) + "\n" for value in values))
        if stage == "instruct":
            pq.write_table(word_table(), local / words.FILE)
        commit(store, stage, "0123456789abcdef", local, inputs={"sets": {"heldout": digest}}, meta={})
        told[stage] = {"key": "0123456789abcdef"}
    store.write_json("runs/one/run.json", {**made.info, "artifacts": told})
    lines = [json.dumps(record("instruct", step)) + "\n" for step in range(1, 4)]
    store.write_bytes("runs/one/metrics.jsonl", "".join(lines).encode())
    return Path(store.uri)


def word_table() -> pa.Table:
    about = {"samples": "held-out", "num_samples": "200"}
    return pa.Table.from_pylist(list(words_of().rows), schema=words.SCHEMA.with_metadata(about))


def run_of(folder: Path) -> RunData:
    return gather(Place.of(str(folder / "runs" / "one")))


def test_all_that_is_there_is_read(folder: Path) -> None:
    run = run_of(folder)
    assert run.unread == []
    assert all(getattr(run, part) for part in PARTS)


def without_manifest_of_eval(folder: Path) -> None:
    (folder / "artifacts/eval-0123456789abcdef/manifest.json").write_text("{}")


def without_examples(folder: Path) -> None:
    (folder / "artifacts/instruct-0123456789abcdef" / examples.FILE).unlink()


def without_words(folder: Path) -> None:
    (folder / "artifacts/instruct-0123456789abcdef" / words.FILE).write_bytes(b"PAR1")


def with_longer_answers(folder: Path) -> None:
    with (folder / "artifacts/eval-0123456789abcdef" / ANSWERS).open("a") as file:
        file.write(" ")


def without_shards(folder: Path) -> None:
    for file in (folder / "data").rglob("*.parquet"):
        file.unlink()


def with_broken_metrics(folder: Path) -> None:
    file = folder / "runs/one/metrics.jsonl"
    file.write_text("no JSON\n" + file.read_text())


def without_json(folder: Path) -> None:
    (folder / "runs/one/run.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "missing", "words_told"),
    [
        (without_examples, {"examples"}, "words of instruct: .*1 of 1 files are not what was committed.*examples.jsonl: .*no file"),
        (without_words, {"words"}, "losses of words of instruct: .*words.parquet: expected"),
        (with_longer_answers, {"answers", "pictures"}, "answers to held-out questions: .*answers.jsonl: expected"),
        (without_manifest_of_eval, {"answers", "pictures"}, "what eval left: .*expected a manifest"),
        (without_shards, {"pictures"}, "pictures of heldout: .*parquet"),
        (with_broken_metrics, {"metrics"}, "metrics.jsonl: .*line 1: expected a JSON object"),
        (without_json, {"examples", "words", "answers", "pictures"}, "run.json: .*expected JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_left_out_with_a_word(
    damage: Callable[[Path], None], missing: set[str], words_told: str, folder: Path
) -> None:
    damage(folder)
    run = run_of(folder)
    assert {part for part in PARTS if not getattr(run, part)} == missing
    assert len(run.unread) == 1
    with pytest.raises(AssertionError, match=words_told):
        raise AssertionError(*run.unread)
    place = Place.of(str(folder / "runs" / "one"))
    assert Path(write_report(place)).is_file()
    other = folder / "runs" / "two"
    other.mkdir()
    (other / "run.json").write_text('{"status": "done", "timings": null}')
    for text in (page([place]), page([place, Place.of(str(other))])):
        assert f"<dt>left out</dt><dd>{run.unread[0].split()[0]}" in text


def test_a_store_that_does_not_answer_makes_no_empty_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(str(folder / "runs" / "one"))

    def away(self: Store, path: str) -> bytes:
        raise NoAnswer(f"{path}: no answer")

    monkeypatch.setattr(Store, "read_bytes", away)
    with pytest.raises(NoAnswer):
        write_report(place)
    assert not (folder / "runs" / "one" / "report.html").exists()


def test_a_sweep_has_the_losses_of_words_of_its_finished_trials(folder: Path) -> None:
    """Those that share an artifact too; what is not there, or none of ours, is left out."""
    made = {"instruct": "artifacts/instruct-0123456789abcdef"}
    others = [{"instruct": "artifacts/instruct-ffff"}, {"instruct": 7}, {"instruct": "../x"}, "none", None]
    trials = [
        *(
            {"name": f"s-{n}", "status": "done", "variant": v, "artifacts": made}
            for n, v in enumerate(("vanilla", "dpa"))
        ),
        {"name": "s-2", "status": "failed", "variant": "cmo", "artifacts": made},
        *({"name": f"o-{n}", "status": "done", "variant": "cmo", "artifacts": a} for n, a in enumerate(others)),
    ]
    (folder / "sweeps/s").mkdir(parents=True)
    (folder / "sweeps/s/sweep.json").write_text(json.dumps({"trials": trials}))
    text = page([Place.of(str(folder / "sweeps/s"))])
    assert "vanilla: nll before" in text
    assert "dpa: nll after" in text
    assert "cmo: nll before" not in text
    assert "Of 200 held-out samples." in text
