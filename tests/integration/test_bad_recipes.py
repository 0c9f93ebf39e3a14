"""Does every wrong recipe end with exit 2 or 1 and one clear message, without a traceback and with nothing half-written?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.integration.runs import Run, changed, make_recipe, run_dpa, tree
from tests.s3 import S3
from tests.tiny_models import LlavaData

MAX_MESSAGE = 2500
"""Characters: a message that a person reads, not a log."""


def check_refused(run: Run, *words: str, codes: tuple[int, ...] = (1, 2)) -> None:
    """The exit code, the message (which says all of `words`, regular expressions), and that it is a message."""
    text = run.stdout + run.stderr
    assert run.returncode in codes, run.output
    assert "Traceback" not in text, run.output
    for word in words:
        assert re.search(word, text, re.IGNORECASE), f"no {word!r} in the message\n{run.output}"
    assert len(text) <= MAX_MESSAGE, run.output


def check_nothing_half_written(store: Path) -> None:
    """What is in the store is whole: no artifact, data set or checkpoint folder without a manifest, no temporary file.

    Data that too much of is in quarantine has no manifest, but keeps the list that the message points to, and which
    parts are done: whole files, each shard of which is as its part says."""
    for folder in [*store.glob("artifacts/*"), *store.glob("data/*")]:
        if (folder / "manifest.json").is_file():
            continue
        assert folder.parent.name == "data", tree(store)
        parts = [json.loads(file.read_text()) for file in folder.glob("parts/*.json")]
        shards = {part["shard"]["name"]: part["shard"]["size_bytes"] for part in parts if part["shard"]}
        assert {file.name: file.stat().st_size for file in folder.glob("*.parquet")} == shards
        lines = (folder / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [line for part in parts for line in part["quarantine"]]
        expected = {"quarantine.jsonl", *shards, *(f"parts/{part['index']:05}.json" for part in parts)}
        assert {file.split()[0] for file in tree(folder)} == expected
    assert not [f for f in tree(store) if f.startswith("checkpoints") or re.search(r"\.(tmp|part|incomplete)", f)]


@pytest.fixture(scope="module")
def recipe(tiny_llm: Callable, tiny_tower: Callable, captions: LlavaData, conversations: LlavaData) -> dict[str, Any]:
    return make_recipe(tiny_llm("llama", bos=True, reserved="token"), tiny_tower("clip"), captions, conversations)


# What the recipe says of itself is wrong: exit 2 and nothing was started or written.
WRONG_VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"stages__instruct__learning_rate": 1e-4}, [r"stages\.instruct\.learning_rate", "unknown"]),
    "unknown section": ({"optimiser": {"lr": 1}}, ["optimiser", "unknown"]),
    "wrong type": ({"stages__instruct__lr": "fast"}, [r"stages\.instruct\.lr", "fast"]),
    "number as text": ({"cluster__workers": "two"}, [r"cluster\.workers", "two"]),
    "wrong choice": ({"method": "dbo"}, ["method", "dbo", "vanilla"]),
    "lower above upper": ({"cmo": {"lower": 0.6, "upper": 0.5}}, ["lower", "upper", r"0\.6", r"0\.5"]),
    "lower above the default upper": ({"cmo": {"lower": 0.7}}, ["lower", "upper", r"0\.7", r"0\.5"]),
    "negative rate": ({"stages__proxy_mllm__lr": -1.0}, [r"stages\.proxy_mllm\.lr"]),
    "not a number": ({"stages__proxy_mllm__lr": float("nan")}, [r"stages\.proxy_mllm\.lr"]),
}


@pytest.mark.parametrize("case", ["unknown key", "lower above the default upper"])
def test_wrong_values_exit_2_and_write_nothing(case: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    changes, words = WRONG_VALUES[case]
    run = run_dpa(changed(recipe, **changes), tmp_path / "store", "wrong", timeout_s=120)
    check_refused(run, *words, codes=(2,))
    assert not (tmp_path / "store").exists() or not tree(tmp_path / "store")


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in WRONG_VALUES if c not in ("unknown key", "lower above the default upper")])
def test_more_wrong_values_exit_2_and_write_nothing(case: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    test_wrong_values_exit_2_and_write_nothing(case, recipe, tmp_path)


@pytest.mark.full
def test_every_error_is_told_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    wrong = changed(recipe, stages__instruct__lrr=1, method="dbo", cluster__workers=0)
    run = run_dpa(wrong, tmp_path / "store", "wrong", timeout_s=120)
    check_refused(run, r"stages\.instruct\.lrr", "method", r"cluster\.workers", codes=(2,))


# What the recipe points at is wrong: found before any stage begins.
def _no_source(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, data__instruct__source=str(folder / "nowhere.json")), [r"nowhere\.json"]


def _no_images(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, data__pretrain__images=str(folder / "no-images")), ["no-images"]


def _not_json(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    (folder / "broken.json").write_text('[{"id": 1, "conv')
    return changed(recipe, data__instruct__source=str(folder / "broken.json")), [r"broken\.json"]


def _no_llm(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, model__llm=str(folder / "no-llm")), ["no-llm"]


def _no_tokenizer(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    shutil.copytree(recipe["model"]["llm"], folder / "bare")
    for file in folder.glob("bare/*token*"):
        file.unlink()
    return changed(recipe, model__llm=str(folder / "bare")), ["bare", "tokenizer"]


def _no_chat_template(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    shutil.copytree(recipe["model"]["llm"], folder / "plain")
    (folder / "plain/chat_template.jinja").unlink()
    return changed(recipe, model__llm=str(folder / "plain")), ["plain", "chat.template"]


def _layer_too_deep(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, model__vision_layer=-9), ["vision_layer", "-9"]


def _tower_is_an_llm(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, model__vision=recipe["model"]["llm"]), ["vision"]


def _size_does_not_fit(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    return changed(recipe, model__image_size=30), ["image_size|patch", "30"]


def _no_processor(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    shutil.copytree(recipe["model"]["vision"], folder / "tower")
    (folder / "tower/preprocessor_config.json").unlink()
    return changed(recipe, model__vision=str(folder / "tower")), ["tower", "processor"]


def _broken_images(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    data = tiny_models.make_captions(folder / "broken", 6)
    for file in data.images.iterdir():
        file.write_bytes(b"no picture")
    source = {"source": str(data.file), "images": str(data.images), "format": "llava"}
    return changed(recipe, data__pretrain=source), ["quarantine"]


WRONG_TARGETS: dict[str, Callable[[dict[str, Any], Path], tuple[dict[str, Any], list[str]]]] = {
    "source that is not there": _no_source,
    "images that are not there": _no_images,
    "source that is not JSON": _not_json,
    "LLM that is not there": _no_llm,
    "LLM without tokenizer": _no_tokenizer,
    "LLM without chat template": _no_chat_template,
    "layer that the tower does not have": _layer_too_deep,
    "tower that is an LLM": _tower_is_an_llm,
    "size that the patches do not fit": _size_does_not_fit,
    "tower without image processor": _no_processor,
    "images that do not open": _broken_images,
}
QUICK_TARGETS = ("LLM without tokenizer", "layer that the tower does not have")


def check_wrong_target(case: str, recipe: dict[str, Any], folder: Path) -> None:
    wrong, words = WRONG_TARGETS[case](recipe, folder)
    run = run_dpa(wrong, folder / "store", "wrong", timeout_s=180)
    check_refused(run, *words)
    check_nothing_half_written(folder / "store")
    assert not list(folder.glob("store/artifacts/proxy-*")), "found before stage 1 had been trained"


@pytest.mark.parametrize("case", QUICK_TARGETS)
def test_wrong_targets_are_found_before_training(case: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    check_wrong_target(case, recipe, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in WRONG_TARGETS if case not in QUICK_TARGETS])
def test_more_wrong_targets_are_found_before_training(case: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    check_wrong_target(case, recipe, tmp_path)


def test_missing_recipe_file(tmp_path: Path) -> None:
    run = run_dpa(tmp_path / "no-such-recipe.yaml", tmp_path / "store", "wrong", timeout_s=120)
    check_refused(run, "no-such-recipe", codes=(2,))
    assert not (tmp_path / "store").exists()


def test_name_taken_by_another_recipe(measured: Run) -> None:
    before = tree(measured.store)
    run = run_dpa(measured.recipe, measured.store, measured.name, "seed=4", timeout_s=120)
    check_refused(run, measured.name, "recipe|seed", codes=(2,))
    assert tree(measured.store) == before


def test_bucket_that_does_not_exist(rclone_s3: S3, recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_dpa(recipe, "s3://no-such-bucket/dpa", "wrong", env=rclone_s3.env, timeout_s=120, folder=tmp_path)
    check_refused(run, "no-such-bucket")
    assert "no-such-bucket" not in [b["Name"] for b in rclone_s3.client().list_buckets()["Buckets"]]


@pytest.mark.full
def test_bucket_that_does_not_exist_on_ceph(ceph_s3: S3, recipe: dict[str, Any], tmp_path: Path) -> None:
    test_bucket_that_does_not_exist(ceph_s3, recipe, tmp_path)


@pytest.mark.full
def test_endpoint_that_does_not_answer(recipe: dict[str, Any], tmp_path: Path) -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    run = run_dpa(recipe, "s3://bucket/dpa", "wrong", env=env, timeout_s=120, folder=tmp_path)
    check_refused(run, r"127\.0\.0\.1:9|endpoint")


@pytest.mark.full
def test_wrong_credentials(rclone_s3: S3, recipe: dict[str, Any], tmp_path: Path) -> None:
    env = {**rclone_s3.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    run = run_dpa(recipe, f"{rclone_s3.uri}/dpa", "wrong", env=env, timeout_s=120, folder=tmp_path)
    check_refused(run, rclone_s3.bucket, "credentials|access|denied|key")
    assert not rclone_s3.keys()


@pytest.mark.full
def test_corrupt_artifact_is_named(measured: Run, tmp_path: Path) -> None:
    """A connector whose bytes are not those of its manifest is not trained on: the message says which file and why."""
    shutil.copytree(measured.store, tmp_path / "store")
    for folder in [*tmp_path.glob("store/artifacts/instruct-*"), *tmp_path.glob("store/runs/*")]:
        shutil.rmtree(folder)
    (file,) = tmp_path.glob("store/artifacts/proxy-mllm-*/connector.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    run = run_dpa(measured.recipe, tmp_path / "store", "corrupt", timeout_s=180)
    check_refused(run, r"connector\.safetensors", "expected", "found", codes=(1,))


@pytest.mark.full
def test_dry_run_starts_and_writes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_dpa(recipe, tmp_path / "store", "dry", "--dry-run", timeout_s=120)
    assert run.returncode == 0, run.output
    assert not (tmp_path / "store").exists() or not tree(tmp_path / "store")
    for word in ("proxy.llm", "proxy.mllm", "instruct", str(json.dumps(recipe["seed"]))):
        assert re.search(word, run.stdout), run.output
