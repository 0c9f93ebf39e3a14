"""Are shards exact, the same whatever made them, written once, and not written where too much cannot be used?"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpa_ray.data import prepare as module
from dpa_ray.data import shapes, shards, sources
from dpa_ray.data.catalog import open_source
from dpa_ray.data.prepare import find_prepared, prepare
from dpa_ray.data.sample import ImageFile, Sample, Turn
from dpa_ray.data.shards import from_row, write_shard
from dpa_ray.errors import UserError
from dpa_ray.recipe import SourceEntry, SourceOptions, SourceSection
from dpa_ray.store import Store
from tests.s3 import S3
from tests.unit.test_sources import make, png, record, upload
from tests.unit.test_webdataset import pairs, tar

ROOT = Path(__file__).parents[2]


def run(store: Store, section: SourceSection, limit: float = 0.0, **options: Any):
    return prepare(store, section, max_quarantined_fraction=limit, **options)


def samples(store: Store, prepared) -> list[Sample]:
    system, root = store.arrow()
    found = []
    for name, rows in prepared.shards:
        with system.open_input_file(f"{root}/{prepared.path}/{name}") as file:
            parquet = pq.ParquetFile(file)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            assert groups == list(rows)
            assert parquet.schema_arrow.equals(shards.SCHEMA)
            found += [from_row(row, prepared.source_name) for row in parquet.read().to_pylist()]
    return found


def tree(store: Store) -> dict[str, str]:
    """Every file under data/ by the digest of its bytes."""
    return {name: hashlib.sha256(store.read_bytes(f"data/{name}")).hexdigest() for name in store.list("data")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TARGET_PART_BYTES", 2000)


def test_samples_and_image_bytes_come_out_exactly(tmp_path, store):
    section = make(tmp_path, [record(i) for i in range(70)])
    prepared = run(store, section)
    assert (prepared.num_rows, prepared.num_quarantined, prepared.row_groups) == (70, 0, [64, 6])
    found = samples(store, prepared)
    assert [s.id for s in found] == [f"r{i}" for i in range(70)]
    assert found[5].place == "set.json#5"
    assert found[5].images == [ImageFile("im/2.png", png(2))]
    assert found[5].turns[1].text == "Answer 5 — ünïcödé 東京"


def test_generated_samples_come_out_exactly_with_their_grounded_words(store):
    options = SourceOptions(size=80, style="ornate")
    prepared = run(store, SourceSection(source="builtin:shapes", options=options))
    found = samples(store, prepared)
    assert found == list(shapes.generate(options))
    assert any(s.grounded for s in found)


def test_the_manifest_names_every_file_with_size_and_digest(tmp_path, store):
    prepared = run(store, make(tmp_path, [record(i) for i in range(5)]))
    manifest = store.read_json(f"{prepared.path}/manifest.json")
    assert store.list(prepared.path) == ["manifest.json", "part-00000.parquet", "quarantine.jsonl", "sizes.uint8"]
    sizes = store.read_bytes(f"{prepared.path}/sizes.uint8")
    digest = hashlib.sha256(sizes).hexdigest()
    assert manifest["sizes"] == {"name": "sizes.uint8", "size_bytes": len(sizes), "sha256": digest}
    assert prepared.sizes == (digest,)
    data = store.read_bytes(f"{prepared.path}/part-00000.parquet")
    footer = data[-int.from_bytes(data[-8:-4], "little") - 8 :]
    assert manifest["shards"] == [
        {
            "name": "part-00000.parquet",
            "rows": [5],
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "footer_sha256": hashlib.sha256(footer).hexdigest(),
        }
    ]
    assert manifest["num_rows"] == manifest["num_source_rows"] == 5
    assert prepared.sizes_bytes == (len(data),)
    assert prepared.footers == (hashlib.sha256(footer).hexdigest(),)
    assert pickle.loads(pickle.dumps(prepared)) == prepared == find_prepared(store, prepared.digest)


def test_a_second_call_reads_no_image_and_writes_nothing(tmp_path, store, monkeypatch):
    section = make(tmp_path, [record(i) for i in range(5)])
    first, before = run(store, section), tree(store)
    monkeypatch.setattr(module, "prepare_part", None)
    monkeypatch.setattr(Store, "write_bytes", None)
    assert run(store, section) == first
    assert tree(store) == before


def test_quarantine_holds_id_place_reason_and_detail(tmp_path, store):
    section = make(tmp_path, [record(0), record(1, image="im/none.png"), "x", record(3)])
    prepared = run(store, section, 0.5)
    lines = store.read_bytes(f"{prepared.path}/quarantine.jsonl").decode().splitlines()
    assert [{k: v for k, v in json.loads(line).items() if k != "detail"} for line in lines] == [
        {"id": "r1", "place": "set.json#1", "reason": "image_missing"},
        {"id": None, "place": "set.json#2", "reason": "bad_record"},
    ]
    assert all(json.loads(line)["detail"] for line in lines)
    assert (prepared.num_rows, prepared.num_quarantined) == (2, 2)
    assert [s.place for s in samples(store, prepared)] == ["set.json#0", "set.json#3"]
    manifest = store.read_json(f"{prepared.path}/manifest.json")
    assert manifest["quarantined"] == {"bad_record": 1, "image_missing": 1}


def test_too_much_in_quarantine_stops_with_counts_and_the_files_place(tmp_path, store):
    section = make(tmp_path, [record(0), record(1, image="im/none.png"), "x", record(3), "y"])
    message = r"3 of 5 samples cannot be used; expected at most 50.00%.*\n  bad_record: 2\n  image_missing: 1\n.*data/"
    with pytest.raises(UserError, match=message) as caught:
        run(store, section, 0.5)
    path = str(caught.value).split()[-1]
    assert len(Path(path).read_text().splitlines()) == 3
    assert not [name for name in store.list("data") if name.endswith("manifest.json")]
    assert run(store, section, 0.6).num_rows == 2
    with pytest.raises(UserError, match=message):
        run(store, section, 0.5)  # prepared by now, and the limit still counts


def test_a_mended_image_is_taken_by_the_next_attempt(tmp_path, store):
    section = make(tmp_path, [record(i) for i in range(3)])
    good = (tmp_path / "im" / "1.png").read_bytes()
    (tmp_path / "im" / "1.png").write_bytes(b"x" * len(good))
    with pytest.raises(UserError, match="image_not_an_image: 1"):
        run(store, section)
    (tmp_path / "im" / "1.png").write_bytes(good)
    assert run(store, section).num_rows == 3


def test_nothing_usable_is_an_error_at_any_limit(tmp_path, store):
    with pytest.raises(UserError, match="2 of 2 samples cannot be used.*and one that can be"):
        run(store, make(tmp_path, ["x", "y"]), 1.0)


def test_system_turns_are_counted(tmp_path, store):
    turns = [{"from": "system", "value": "Be brief."}, *record(0)["conversations"]]
    prepared = run(store, make(tmp_path, [record(0), record(1, conversations=turns)]))
    assert prepared.num_with_system == 1


def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_GROUP_BYTES", 1000)
    turns = [Turn("human", "<image>"), Turn("gpt", "x")]

    def one(size: int) -> Sample:
        return Sample("a", "#0", turns, [ImageFile("a", b"x" * size)])

    sizes = [300, 300, 300, 5000, 10, 10] + [1] * 20
    groups = write_shard(tmp_path / "x.parquet", ((i, one(size)) for i, size in enumerate(sizes)))
    assert groups[:3] == [2, 1, 1], "two of 300 and one; the one that is too large has a group of its own"
    assert sum(groups) == len(sizes)
    assert max(groups) <= 14
    monkeypatch.setattr(shards, "MAX_GROUP_ROWS", 4)
    assert write_shard(tmp_path / "y.parquet", ((i, one(1)) for i in range(9))) == [4, 4, 1]


def test_a_part_without_a_usable_row_has_no_shard(tmp_path, store, small_parts, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PART_ROWS", 2)
    prepared = run(store, make(tmp_path, [record(0), record(1), "x", "y", record(4)]), 0.5)
    assert [name for name, _ in prepared.shards] == ["part-00000.parquet", "part-00002.parquet"]
    assert [s.place for s in samples(store, prepared)] == ["set.json#0", "set.json#1", "set.json#4"]


def test_a_corrupt_manifest_is_told(tmp_path, store):
    section = make(tmp_path, [record(0)])
    prepared = run(store, section)
    store.write_bytes(f"{prepared.path}/manifest.json", b'{"schema": 99}')
    with pytest.raises(UserError, match=r"manifest.json: expected a manifest of schema 1 .* delete the folder"):
        run(store, section)


def test_half_made_files_of_a_killed_attempt_are_replaced_and_whole_parts_kept(tmp_path, store, small_parts):
    section = make(tmp_path, [record(i) for i in range(40)])
    made = run(store, section)
    expected = tree(store)
    assert len(made.shards) > 3
    folder = made.path
    kept = store.read_bytes(f"{folder}/part-00001.parquet")
    shard = store.read_json(f"{folder}/manifest.json")["shards"][1]
    store.delete(f"{folder}/manifest.json")
    store.write_bytes(f"{folder}/part-00000.parquet", b"half")
    store.write_bytes(f"{folder}/part-00099.parquet", b"left over")
    part = {"index": 1, "num_source_rows": sum(shard["rows"]), "num_with_system": 0, "shard": shard, "quarantine": []}
    store.write_json(f"{folder}/parts/00001.json", part)
    os.utime(Path(store.url(f"{folder}/part-00001.parquet")), (1, 1))
    again = run(store, section)
    assert again == made
    assert tree(store) == expected
    assert Path(store.url(f"{folder}/part-00001.parquet")).stat().st_mtime == 1
    assert store.read_bytes(f"{folder}/part-00001.parquet") == kept


SLOW = """
import sys, time
from dpa_ray.data import prepare, sources
from dpa_ray.recipe import SourceSection
from dpa_ray.store import Store
sources.TARGET_PART_BYTES = 2000
inner = prepare.prepare_part
def slow(*arguments):
    result = inner(*arguments)
    print(result["index"], flush=True)
    time.sleep(0.3)
    return result
prepare.prepare_part = slow
prepare.prepare(Store(sys.argv[1]), SourceSection(source=sys.argv[2]), max_quarantined_fraction=0)
"""


def test_killed_at_any_place_and_started_again_it_goes_on(tmp_path, store, small_parts):
    section = make(tmp_path, [record(i) for i in range(40)])
    command = [sys.executable, "-c", SLOW, store.uri, section.source]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "2":
                break
        process.send_signal(signal.SIGKILL)
    (folder,) = store.list_dirs("data")
    assert find_prepared(store, folder) is None
    done = len(store.list(f"data/{folder}/parts"))
    assert done >= 3
    made: list[int] = []
    inner = module.prepare_part

    def counted(*arguments: Any) -> dict[str, Any]:
        made.append(arguments[3].index)
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare_part", counted)
        prepared = run(store, section)
    assert made == list(range(done, len(prepared.shards)))
    other = Store(str(tmp_path / "other"))
    assert run(other, section) == prepared
    assert tree(other) == tree(store)


def test_progress_is_reported(tmp_path, store, small_parts):
    said: list[str] = []
    prepared = run(store, make(tmp_path, [record(i) for i in range(20)]), report=said.append)
    assert "preparing 20 samples" in said[0]
    assert all(f"data {prepared.digest}" in line for line in said)
    assert "20 samples in" in said[-1]
    assert "0 in quarantine" in said[-1]


def test_from_s3_to_s3(tmp_path, s3_server: S3):
    section = make(tmp_path / "set", [record(i) for i in range(10)])
    upload(s3_server, tmp_path / "set", "in/")
    local, remote = Store(str(tmp_path / "store")), Store(f"{s3_server.uri}/store")
    prepared = run(remote, SourceSection(source=f"{s3_server.uri}/in/set.json"))
    assert prepared == run(local, section)
    assert samples(remote, prepared) == samples(local, prepared)
    names = {name: digest for name, digest in tree(remote).items() if not name.endswith("manifest.json")}
    assert names.items() <= tree(local).items()


# -- with Ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_ray_tasks_make_the_same_bytes(tmp_path, store, small_parts, monkeypatch, local_ray):
    records: list[Any] = [record(i) for i in range(40)]
    records[7] = "x"
    section = make(tmp_path, records)
    monkeypatch.setattr(module, "IN_PROCESS_ROWS", 10)
    distributed = run(store, section, 0.1)
    other = Store(str(tmp_path / "other"))
    assert run(other, section, 0.1, ray_is_ready=lambda: False) == distributed
    assert tree(other) == tree(store)


def test_ray_tasks_read_tars_and_what_is_taken_of_them(tmp_path, store, monkeypatch, local_ray):
    monkeypatch.setattr(sources, "MAX_PART_ROWS", 8)
    monkeypatch.setattr(module, "IN_PROCESS_ROWS", 10)
    for i in range(2):
        tar(tmp_path / f"s-{i}.tar", pairs(i * 20, i * 20 + 20))
    entry = {"source": str(tmp_path / "s-{0..1}.tar"), "take": "last:30", "weight": 2.0}
    section = SourceSection(source=[SourceEntry(**entry)])
    distributed = run(store, section)
    assert distributed.num_rows == 60
    other = Store(str(tmp_path / "other"))
    assert run(other, section, ray_is_ready=lambda: False) == distributed
    assert tree(other) == tree(store)


def test_an_error_in_a_ray_task_is_its_message_alone(tmp_path, store, small_parts, monkeypatch, local_ray):
    section = make(tmp_path, [record(i) for i in range(40)])
    monkeypatch.setattr(module, "IN_PROCESS_ROWS", 10)
    source = open_source(section)
    scan = source.scan()
    (tmp_path / "set.json").unlink()
    with pytest.raises(UserError, match=r"^expected a file at .*set.json, found nothing$"):
        list(module._with_ray(store, source, f"data/{scan.digest}", list(scan.parts)))


# -- the command


@pytest.fixture
def main() -> Callable[[list[str]], int]:
    """`main` of jobs/prepare_data.py."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "jobs" / "prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job.main  # type: ignore[no-any-return]


def test_the_command_prepares_and_names_the_folder(tmp_path):
    make(tmp_path / "set", [record(i) for i in range(5)])
    line = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), "set/set.json", "--store", "here"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip(), "manifest.json").exists()
    assert str(tmp_path / "here") in done.stdout


def test_the_command_takes_options_of_the_builtin_source(tmp_path, main, capsys):
    options = ["--option", "size=5", "--option", "style=qa"]
    assert main(["builtin:shapes", "--store", str(tmp_path), *options]) == 0
    assert "5 samples in 1 shards" in capsys.readouterr().err


def test_the_command_takes_columns_and_a_choice_of_rows(tmp_path, main, capsys):
    rows = {"pic": [png(1), png(2), png(3)], "says": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    command = [str(tmp_path / "a.parquet"), "--store", str(tmp_path / "store"), "--column", "image=pic"]
    assert main([*command, "--column", "text=says", "--take", "last:2"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert [row["place"] for row in pq.read_table(folder / "part-00000.parquet").to_pylist()] == ["#1", "#2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.json"], 1, "expected a file at"),
        (["set.json", "--format", "parquet"], 1, "expected Parquet"),
        (["builtin:nothing"], 2, "expected builtin:shapes"),
        (["set.json", "--option", "size=5"], 2, "options belong to builtin sources only"),
        (["builtin:shapes", "--option", "colour=5"], 2, "--option colour: unknown key; expected one of style"),
        (["set.json", "--column", "text=x"], 2, "columns belong to parquet and webdataset only"),
        (["set.parquet", "--column", "colour=x"], 2, "--column colour: unknown key; expected one of image, text,"),
        (["set.parquet", "--column", "imge=x"], 2, "--column imge: unknown key (did you mean image?)"),
        (["set.parquet", "--column", "image"], 2, "--column: expected KEY=VALUE, found 'image'"),
        (
            ["builtin:shapes", "--option", "style=a: b: c"],
            2,
            "--option style: expected a YAML value, found 'a: b: c': ",
        ),
        (["builtin:shapes", "--option", "size=-1"], 2, "--option size: expected a number > 0, found integer -1"),
        (
            ["set.json", "--take", "100"],
            2,
            "--take: expected first:N, last:N or random:N, where N may be a percentage like 10%, found '100'\n",
        ),
        (
            ["set.parquet", "--take", "first:1", "--column", "imge=x"],
            2,
            "--column imge: unknown key (did you mean image?)",
        ),
        (["*.json"], 1, "globs and {00..12} patterns are for tars and Parquet only"),
        (["set{0..1}.json"], 1, "globs and {00..12} patterns are for tars and Parquet only"),
        (["broken.json"], 1, "(--max-quarantined-fraction)"),
        (["set.json", "--take", "some"], 2, "expected first:N, last:N or random:N"),
        (["set.tar", "--images", "x"], 2, "images does not belong to webdataset"),
        (["set.json", "--max-quarantined-fraction", "2"], 2, "expected 0 to 1, found 2"),
        (["set.json", "--retry-s", "-1"], 2, "--retry-s: expected 0 or more, found -1"),
        (["set.json", "--format", "zip"], 2, "invalid choice"),
        ([], 2, "required: SOURCE"),
    ],
)
def test_wrong_arguments_end_with_one_message(tmp_path, monkeypatch, capsys, main, arguments, code, message):
    make(tmp_path, [record(0)])
    (tmp_path / "broken.json").write_text('[{"id": "a", "conversations": []}]')
    monkeypatch.chdir(tmp_path)
    try:
        found = main([*arguments, "--store", str(tmp_path / "store")])
    except SystemExit as end:  # argparse
        found = end.code
    assert found == code
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("manifest.json"))


@pytest.mark.parametrize("store", ["s3:/bucket/dpa", "http://host/dpa", "gs://", ""])
def test_the_command_takes_the_stores_that_a_recipe_takes(store, tmp_path, monkeypatch, capsys, main):
    make(tmp_path, [record(0)])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["set.json", "--store", store]) == 2
    assert (
        "--store: expected a folder, s3://bucket/prefix or gs://bucket/prefix, found string" in capsys.readouterr().err
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_preparing_is_done_before_it_is_slow(tmp_path, store):
    """A guard against accidental quadratic work: 2,000 small records within seconds."""
    section = make(tmp_path, [record(i) for i in range(2000)])
    start = time.process_time()
    run(store, section)
    assert time.process_time() - start < 10


@pytest.mark.ci
def test_memory_does_not_grow_with_the_source_and_the_rate_is_shown():
    """20,000 samples; tests/benchmarks/prepare.py does 100,000. 2 GB a worker is what the data plane promises."""
    from tests.benchmarks.prepare import measure

    result = measure(20_000)
    assert result["peak_bytes"] < 2e9
    assert result["rates_shown"] >= 2
