"""What comes of odd content wherever a run reads: a result, or one message that names the file; never another exception?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_ray.data.llava import Unusable, parse
from dpa_ray.data.prepare import prepare
from dpa_ray.data.prepared import find_prepared, sealed
from dpa_ray.engine import blind_job
from dpa_ray.engine.logs import rewrite_stage
from dpa_ray.errors import UserError
from dpa_ray.model import lora, vlm
from dpa_ray.recipe import Recipe, RecipeError, SourceSection
from dpa_ray.report.metrics import read
from dpa_ray.stages import imports
from dpa_ray.stages.runs import Run
from dpa_ray.store import Store, artifacts, checkpoints
from dpa_ray.store.lease import LeaseTaken, held

DEEP = b"[" * 100_000
GARBAGE: dict[str, bytes] = {
    "empty": b"", "a blank": b" \n", "no JSON": b"{", "binary": bytes(range(256)), "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"), "NUL": b"\0" * 100, "null": b"null", "a number": b"3", "a text": b'"x"', "a list": b"[]",
    "an empty object": b"{}", "lists in lists": DEEP, "objects in objects": b'{"a":' * 100_000, "NaN": b'{"schema": NaN}',
    "a long number": b'{"schema": ' + b"9" * 5000 + b"}", "half a surrogate": b'{"stage": "\\ud800"}', "two values": b"{} {}",
    "a pickle": b"\x80\x04K\x01.", "a page of a proxy": b"<html>502 Bad Gateway</html>", "a BOM": b"\xef\xbb\xbf{}",
}  # fmt: skip
KEY = "0123456789abcdef"
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(QUICK, max_examples=4_000)


# -- what a run reads of the store


class Place:
    """A kind of file in the store, and what reads it. `others`: what reading odd content may also come to."""

    def __init__(self, path: str, use: Callable[[Store, Recipe], Any], none_counts: bool = False):
        self.path, self.use, self.none_counts = path, use, none_counts


def _lease(store: Store, recipe: Recipe) -> None:
    with held(store, "runs/small/lease", report=print, lost=lambda: None, lapses_after_s=0.05):
        pass


def _named(store: Store, recipe: Recipe) -> None:
    Run(store, recipe).check_name()


PLACES = {
    "artifact manifest": Place(
        f"artifacts/blind-{KEY}/manifest.json", lambda store, _: artifacts.find(store, "blind", KEY)
    ),
    "checkpoint manifest": Place(
        f"checkpoints/blind-{KEY}/step-00000001-a/manifest.json",
        lambda store, _: checkpoints.whole_ones(store, "blind", KEY), none_counts=True,
    ),
    "data manifest": Place("data/abc/manifest.json", lambda store, _: find_prepared(store, "abc")),
    "run.json": Place("runs/small/run.json", _named),
    "metrics.jsonl": Place("runs/small/metrics.jsonl", lambda store, _: read(store, "runs/small"), none_counts=True),
    "quarantine.jsonl": Place(
        "runs/small/quarantine.jsonl",
        lambda store, _: rewrite_stage(store, "runs/small/quarantine.jsonl", "one", []), none_counts=True,
    ),
    "lease": Place("runs/small/lease/1.json", _lease, none_counts=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_garbage_in_the_store_is_named_and_never_taken_for_something(kind: str, recipe: Callable[..., Recipe]) -> None:
    made, place = recipe(), PLACES[kind]
    store = Store(made.store)
    for name, content in GARBAGE.items():
        store.write_bytes(place.path, content)
        try:
            found = place.use(store, made)
        except (UserError, RecipeError) as err:
            assert not isinstance(err, LeaseTaken)
            text = str(err)
            assert store.url(place.path) in text, (name, text)
            assert any(word in text for word in ("delete", "mend")), (name, text)
            assert "\n" not in text, (name, text)
            assert len(text) < 600, (name, text)
        else:
            assert place.none_counts, name
            assert not found, (name, found)
        store.delete("runs")


def test_another_runs_name_is_refused_whatever_its_version(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    store = Store(made.store)
    store.write_bytes("runs/small/metrics.jsonl", b"")
    for values in (
        {"recipe_digest": "other", "status": "done"}, {"recipe_digest": 3, "status": None},
        {"recipe_digest": None, "status": ["failed"], "more": 1},
    ):  # fmt: skip
        store.write_json("runs/small/run.json", values)
        with pytest.raises(RecipeError, match="name: the run small exists"):
            _named(store, made)


MANIFEST: dict[str, Any] = {
    "schema": 1, "digest": "abc", "source_name": "s", "num_rows": 4, "num_with_system": 0, "num_quarantined": 0,
    "shards": [{"name": "part-00000.parquet", "rows": [4], "size_bytes": 9, "sha256": "0", "footer_sha256": "0"}],
}  # fmt: skip
ODD_DATA: list[dict[str, Any]] = [
    *({key: value} for key in MANIFEST for value in (None, -1, 1.5, "x" * 3, [1], {"a": 1}) if MANIFEST[key] != value),
    {"num_rows": 5}, {"shards": [{}]}, {"shards": [{**MANIFEST["shards"][0], "rows": "4"}]}, {"shards": [{**MANIFEST["shards"][0], "rows": [True]}]},
    {"mixture": 3}, {"mixture": [3]}, {"mixture": [{}]}, {"mixture": [{"digest": "abc", "times": 1}]},
    {"mixture": [{"digest": "x", "times": "1"}]}, {"mixture": [{"digest": 3, "times": 1}]},
    {"mixture": [{"digest": "x", "times": -1}]},
]  # fmt: skip


def test_an_odd_manifest_of_data_is_named_with_what_to_do(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json("data/abc/manifest.json", sealed(MANIFEST))
    good = find_prepared(store, "abc")
    assert good is not None
    taken = []
    for change in ODD_DATA:
        store.write_json("data/abc/manifest.json", sealed({**MANIFEST, **change}))
        try:
            found = find_prepared(store, "abc")
        except UserError as err:
            assert "data/abc/manifest.json: expected a manifest" in str(err)
            assert f"delete the folder {store.url('data/abc')}" in str(err)
        else:
            taken.append((change, found))
    assert [change for change, _ in taken] == [{"source_name": "xxx"}], "a text as good as any"


def test_no_flipped_bit_of_a_data_manifest_is_taken(tmp_path: Path) -> None:
    store, path = Store(str(tmp_path)), tmp_path / "data" / "abc" / "manifest.json"
    store.write_json("data/abc/manifest.json", sealed(MANIFEST))
    good, whole = find_prepared(store, "abc"), path.read_bytes()
    wrong = []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        try:
            if find_prepared(store, "abc") != good:
                wrong.append(place)
        except UserError as err:
            assert str(path) in str(err)
    seal = whole.index(b'"sha256": ', whole.index(b"]"))
    assert all(seal < place < seal + 8 for place in wrong), "only its seal's own name may be another"


def test_odd_notes_of_staged_scores_make_them_be_computed_again(tmp_path: Path) -> None:
    from types import SimpleNamespace

    store = Store(str(tmp_path))
    task: Any = SimpleNamespace(result=SimpleNamespace(stage="blind", key=KEY))
    folder = blind_job.staging(task)
    store.write_bytes(f"{folder}/shard-00000.parquet", b"scores")
    for content in (*GARBAGE.values(), b'{"size_bytes": 6}', b'{"size_bytes": "x", "sha256": 1}'):
        store.write_bytes(f"{folder}/shard-00000.parquet.json", content)
        assert blind_job.staged(store, task) == {}


# -- imports


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_adapter_of_ones_own_is_named(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    good = {"adapter_config.json": b'{"peft_type": "LORA"}'}
    for number, content in enumerate([*GARBAGE.values(), None]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"a": zeros(1)}, folder / "adapter_model.safetensors")
        for file, data in good.items():
            (folder / file).write_bytes(data)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            imports.import_adapter(str(folder), Store(str(tmp_path / "store")))
        assert str(folder) in str(caught.value)
    assert not Store(str(tmp_path / "store")).list("artifacts")


@pytest.mark.parametrize("name", ["connector.safetensors", "mm_projector.bin"])
def test_a_broken_connector_of_ones_own_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for content in GARBAGE.values():
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            imports.import_connector(str(file), Store(str(tmp_path / "store")))
        assert str(file) in str(caught.value)
    for source in (tmp_path / "none.bin", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="stages.proxy_mllm.from"):
            imports.import_connector(str(source), Store(str(tmp_path / "store")))
    assert not Store(str(tmp_path / "store")).list("artifacts")


def test_a_safetensors_header_of_any_size_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "connector.safetensors"
    for size in (0, 7, 2**31, 2**63, 2**64 - 1):
        file.write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(UserError, match="not readable as a connector"):
            vlm.import_connector(file)
        shutil.copy(file, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match="not readable as a PEFT adapter"):
            lora.check_adapter(tmp_path)


# -- any bytes at all


def manifest_bytes(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Any bytes; any JSON; a good manifest with some values replaced, or a stretch of its bytes."""
    text = json.dumps(good).encode()
    replaced = st.dictionaries(st.sampled_from(sorted(good)), ANY, min_size=1, max_size=3).map(
        lambda changes: json.dumps({**good, **changes}).encode()
    )
    cut = st.tuples(st.integers(0, len(text)), st.integers(0, 20), st.binary(max_size=20)).map(
        lambda c: text[: c[0]] + c[2] + text[c[0] + c[1] :]
    )
    return st.binary(max_size=200) | ANY.map(lambda value: json.dumps(value).encode()) | replaced | cut


ARTIFACT: dict[str, Any] = {
    "schema": 1, "stage": "blind", "key": KEY, "files": {"a": {"size_bytes": 1, "sha256": "0" * 64}}, "inputs": {}, "meta": {},
    "versions": {}, "created": "now",
}  # fmt: skip
CHECKPOINT: dict[str, Any] = {
    "schema": 1, "stage": "blind", "key": KEY, "step": 1, "files": {"a": {"size_bytes": 1, "sha256": "0" * 64}},
    "index": {}, "num_updates": 1, "world_size": 1, "untaught": [], "meta": {},
}  # fmt: skip
FUZZED: dict[str, tuple[dict[str, Any], str]] = {
    "artifact": (ARTIFACT, "artifact manifest"), "checkpoint": (CHECKPOINT, "checkpoint manifest"),
    "data": (MANIFEST, "data manifest"),
}  # fmt: skip


def fuzz_manifest(kind: str, folder: Path, content: bytes) -> None:
    place, store = PLACES[FUZZED[kind][1]], Store(str(folder))
    store.write_bytes(place.path, content)
    try:
        place.use(store, None)  # type: ignore[arg-type]
    except UserError as err:
        assert store.url(place.path) in str(err)


@pytest.mark.parametrize("kind", FUZZED)
def test_any_bytes_as_a_manifest_are_a_result_or_a_message(kind: str, tmp_path: Path) -> None:
    QUICK(given(manifest_bytes(FUZZED[kind][0]))(lambda content: fuzz_manifest(kind, tmp_path, content)))()


@pytest.mark.full
@pytest.mark.parametrize("kind", FUZZED)
def test_any_bytes_as_a_manifest_for_long(kind: str, tmp_path: Path) -> None:
    LONG(given(manifest_bytes(FUZZED[kind][0]))(lambda content: fuzz_manifest(kind, tmp_path, content)))()


TURN = st.fixed_dictionaries(
    {}, optional={"from": ANY | st.just("human"), "value": ANY | st.just("<image>\nWhat?"), "role": ANY, "content": ANY}
)
RECORD = ANY | st.fixed_dictionaries(
    {}, optional={"id": ANY, "image": ANY, "conversations": ANY | st.lists(TURN, max_size=3), "messages": ANY}
)


def fuzz_record(record: Any) -> None:
    try:
        parse(record)
    except Unusable as err:
        assert err.reason


@settings(QUICK, max_examples=150)
@given(RECORD)
def test_any_record_is_a_sample_or_unusable(record: Any) -> None:
    fuzz_record(record)


@pytest.mark.full
@LONG
@given(RECORD)
def test_any_record_for_long(record: Any) -> None:
    fuzz_record(record)


def fuzz_source(folder: Path, name: str, content: bytes) -> None:
    """Prepared with all rows in quarantine allowed: prepared, or told by the source's name."""
    (folder / name).write_bytes(content)
    section = SourceSection(source=str(folder / name), images=None if name.endswith(".tar") else str(folder))
    store = Store(str(folder / "store"))
    try:
        prepare(store, section, max_quarantined_fraction=1.0)
    except UserError as err:
        assert name in str(err) or "quarantine" in str(err), err
    finally:
        store.delete("data")


JSON_SOURCE = st.binary(max_size=60) | st.lists(RECORD, max_size=4).map(lambda v: json.dumps(v).encode()) | st.tuples(
    st.lists(RECORD, min_size=1, max_size=3), st.integers(0, 200), st.binary(max_size=8)
).map(lambda c: (text := json.dumps(c[0]).encode())[: c[1]] + c[2] + text[c[1] + 1 :])  # fmt: skip


def tar_bytes() -> st.SearchStrategy[bytes]:
    """A tar of an image and a caption with a stretch of its bytes replaced, or cut off."""
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("a.png", b"\x89PNG no picture"), ("a.txt", b"A caption."), ("b.json", b'{"caption": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    good = buffer.getvalue()[: 7 * 512]
    return st.tuples(st.integers(0, 6 * 512), st.binary(max_size=24), st.integers(0, len(good))).map(
        lambda c: (good[: c[0]] + c[1] + good[c[0] + len(c[1]) :])[: max(c[2], 512) if c[2] % 2 else None]
    )


SOURCES = {"set.json": JSON_SOURCE, "set.jsonl": JSON_SOURCE, "set.tar": tar_bytes() | st.binary(max_size=600)}


@pytest.mark.parametrize("name", SOURCES)
def test_any_bytes_as_a_source_are_data_or_a_message(name: str, tmp_path: Path) -> None:
    settings(QUICK, max_examples=40)(given(SOURCES[name])(lambda content: fuzz_source(tmp_path, name, content)))()


@pytest.mark.full
@pytest.mark.parametrize("name", SOURCES)
def test_any_bytes_as_a_source_for_long(name: str, tmp_path: Path) -> None:
    settings(LONG, max_examples=1_000)(given(SOURCES[name])(lambda content: fuzz_source(tmp_path, name, content)))()
