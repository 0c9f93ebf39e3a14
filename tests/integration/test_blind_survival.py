"""The job that computes q, killed half-way: does the next run compute only what was not kept, and is it the same to the bit?

A shard that a run must not read, or must hang at, is a pipe that nobody writes to: opening it never returns. So where the
run stands when it is killed, and what it did not read, do not depend on how fast anything is.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import tiny_models
from tests.integration.runs import Running, artifact, make_recipe, start_dpa

NUM_CAPTIONS = (9, 9, 9, 5)
"""In the shards, one a source: the job takes the largest first, so that the last is known by its size."""
NUM_CONVERSATIONS = 8


@pytest.fixture(scope="module")
def recipe(assets_dir: Path, tiny_llm: Callable, tiny_tower: Callable) -> dict[str, Any]:
    """cmo, so that the job comes first; captions in four sources, each a shard of its own."""
    folder = assets_dir / "blind_survival"
    captions = [tiny_models.make_captions(folder / f"captions-{n}", num, seed=n) for n, num in enumerate(NUM_CAPTIONS)]
    conversations = tiny_models.make_conversations(folder / "conversations", NUM_CONVERSATIONS, seed=9)
    made = make_recipe(tiny_llm("llama", bos=True), tiny_tower("clip"), captions[0], conversations, method="cmo")
    sources = [{"source": str(data.file), "images": str(data.images), "format": "llava"} for data in captions]
    made["data"] |= {"pretrain": {"source": sources}, "check_supervision": False}  # that check reads shards
    return made


def wait_until(running: Running, what: str, there: Callable[[], bool], timeout_s: float = 200) -> None:
    until = time.monotonic() + timeout_s
    while running.process.poll() is None and time.monotonic() < until:
        if there():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} never came: {running.finished(1).output}")


def close(shard: Path) -> None:
    """Put a pipe in its place, and the shard beside it."""
    shard.rename(shard.with_suffix(".kept"))
    os.mkfifo(shard)


def open_again(shard: Path) -> None:
    shard.unlink()
    shard.with_suffix(".kept").rename(shard)


def caption_shards(store: Path) -> tuple[list[Path], Path]:
    """Those that the job takes first, and the last."""
    rows = {path: pq.read_metadata(path).num_rows for path in (store / "data").glob("*/*.parquet")}
    assert sorted(rows.values()) == sorted([*NUM_CAPTIONS, NUM_CONVERSATIONS])
    (last,) = (path for path, num in rows.items() if num == min(NUM_CAPTIONS))
    return [path for path, num in rows.items() if num == max(NUM_CAPTIONS)], last


def kept(store: Path) -> dict[str, bytes]:
    """Files of the unfinished artifact whose digests are there, which is what counts as committed."""
    folder = store / "checkpoints"
    digests = folder.glob("blind-*/*.parquet.json")
    return {digest.stem: digest.with_suffix("").read_bytes() for digest in digests}


def q_of(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in artifact(store, "blind").glob("*.parquet")}


@pytest.mark.ci
def test_killed_half_way_it_computes_the_rest_only(tmp_path: Path, recipe: dict[str, Any]) -> None:
    store = tmp_path / "store"

    def run_until(what: str, there: Callable[[], bool]) -> None:
        running = start_dpa(recipe, store, "run")
        wait_until(running, what, there)
        running.kill_all()

    def finished() -> bool:
        return any((store / "artifacts").glob("blind-*/manifest.json"))

    run_until("undisturbed q", finished)
    expected = q_of(store)
    assert len(expected) == len(NUM_CAPTIONS)
    shutil.rmtree(artifact(store, "blind"))
    shutil.rmtree(store / "checkpoints", ignore_errors=True)

    first, last = caption_shards(store)
    close(last)
    run_until("all shards but one", lambda: len(kept(store)) == len(first))
    assert not finished()
    half = kept(store)
    assert half.items() < expected.items()

    open_again(last)
    for shard in first:
        close(shard)

    def nothing_is_left() -> bool:
        return not list((store / "checkpoints").glob("blind-*/*.parquet"))

    run_until("the artifact, without a look at the other shards", lambda: finished() and nothing_is_left())
    assert q_of(store) == expected
