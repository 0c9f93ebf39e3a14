"""The batch job that writes q: each worker takes prepared shards, and what is computed of one is never computed again.

The workers are those of training, not a pool of actors of the job's own: they hold the cluster's GPUs from the first
task of a run to its last, so that others would wait for them for ever. A shard's file goes to a staging place in the
store, its digest after it, and counts from then on; all together become the artifact.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpa_ray.data.blind_scores import Scores, file_name, is_finite, write_scores
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.encode import Encoder
from dpa_ray.data.retry import bridging
from dpa_ray.data.sample import Sample
from dpa_ray.data.skip import entry_of
from dpa_ray.data.texts import text_groups
from dpa_ray.data.threads import ordered_map
from dpa_ray.engine.protocol import barrier, from_rank_0, rank, world_size
from dpa_ray.errors import BrokenJson, UserError
from dpa_ray.model.blind import TextSample, packed_scores, row_width, text_of
from dpa_ray.pack import first_fit
from dpa_ray.stages.blind import BlindBuilt, build_blind, encoder
from dpa_ray.stages.spec import BlindTask
from dpa_ray.store.artifacts import commit, digest_folder
from dpa_ray.store.digests import differences
from dpa_ray.store.fs import Store

PASS_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Text tokens of one forward pass."""


@dataclass(frozen=True)
class _Text:
    """A row's text, has it an image, where it comes from, what names it in `data.skip_ids`, and whether it is there."""

    sample: TextSample
    pictured: bool
    place: str
    entry: str
    skipped: bool


Text = _Text | None
"""None where nobody asks for the row."""


def compute_blind(
    task: BlindTask,
    store: Store,
    device: torch.device,
    cursor: Cursor,
    tell: Callable[..., None],
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Compute and commit q of the samples that the reading stage takes by `cursor`. All ranks call it.

    `tell` brings an event to the driver, from any rank; `confirm` raises on rank 0 where another process may have taken
    the work over. Raises: UserError where a sample cannot be read or (one that
    stage 2 does not skip) has a q that is not finite, or where the LLM does not fit on the device.
    """
    start = time.perf_counter()
    wanted = chosen_rows(cursor, task.reader.num_steps, task.reader.data.num_rows)
    ends = np.cumsum([sum(groups) for _, groups in task.reader.data.shards])
    by_shard = np.split(wanted, ends[:-1])
    sizes = {shard: int(rows.sum()) for shard, rows in enumerate(by_shard) if rows.any()}
    done = from_rank_0(staged(store, task) if rank() == 0 else {})
    left = {shard: num for shard, num in sizes.items() if file_name(shard) not in done}
    if rank() == 0:
        tell("blind_started", num_shards=len(sizes), num_done=len(sizes) - len(left))
    mine = share(left, world_size())[rank()]
    if mine:
        try:
            _compute(task, store, device, {shard: by_shard[shard] for shard in mine}, tell)
        except torch.OutOfMemoryError as err:
            raise UserError(
                f"q cannot be computed beforehand: the whole LLM has to fit on each worker's GPU ({str(err).splitlines()[0]}); "
                "set cmo.blind=live"
            ) from None
    barrier()
    if rank() == 0:
        meta = {
            "num_samples": int(wanted.sum()), "num_shards": len(sizes), "num_shards_found": len(sizes) - len(left),
            "run": task.run_path, "world_size": world_size(),
        }  # fmt: skip
        _finish(task, store, [file_name(shard) for shard in sizes], meta, start, confirm)
        tell("blind_finished")


def chosen_rows(cursor: Cursor, num_steps: int, num_rows: int) -> np.ndarray:
    """(num_rows,) bool: is the row taken in any of the first `num_steps` steps?"""
    if num_steps >= cursor.steps_per_epoch and cursor.num_samples == num_rows:
        return np.ones(num_rows, bool)
    wanted = np.zeros(num_rows, bool)
    for step in range(min(num_steps, cursor.steps_per_epoch)):  # a further epoch takes the same samples
        wanted[cursor.rows(0, step)] = True
    return wanted


def share(sizes: dict[int, int], num_ranks: int) -> list[list[int]]:
    """Shards for each rank, about equally many rows: the largest first, to the rank that has least."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for shard in sorted(sizes, key=lambda s: (-sizes[s], s)):
        least = loads.index(min(loads))
        shares[least].append(shard)
        loads[least] += sizes[shard]
    return shares


# -- one rank's shards


def _compute(
    task: BlindTask, store: Store, device: torch.device, shards: dict[int, np.ndarray], tell: Callable[..., None]
) -> None:
    encode = encoder(task, store)
    built = build_blind(task, store)
    built.llm = built.llm.to(device)
    for shard, wanted in shards.items():
        with bridging(task.recipe.data.retry_s), tempfile.TemporaryDirectory() as tmp:
            rows: list[Scores | None] = []
            for texts in _passes(_texts(task, store, encode, shard, wanted), PASS_TOKENS.get(device.type, 2048)):
                rows += _scored(built, texts)
            write_scores(Path(tmp) / file_name(shard), task.reader.data.shards[shard][1], rows)
            _stage(store, task, Path(tmp), file_name(shard))
        tell("blind_shard", num_samples=int(wanted.sum()))


def _texts(task: BlindTask, store: Store, encode: Encoder, shard: int, wanted: np.ndarray) -> Iterator[list[Text]]:
    """The texts of each row group, encoded by a thread ahead of the caller."""

    data, skipped = task.reader.data, {s.row for s in task.reader.skipped}
    start = sum(sum(groups) for _, groups in data.shards[:shard])

    def text(inside: int, sample: Sample) -> Text:
        if not wanted[inside]:
            return None
        row = start + inside
        try:
            e = encode(sample)
        except UserError:
            if row not in skipped:
                raise
            return None
        own = text_of(e.input_ids, e.target, encode.image_token_id)
        if e.num_images == 0:  # nothing of it is passed
            own = TextSample(own.input_ids[:0], own.position_ids[:0], own.targets)
        return _Text(own, e.num_images > 0, sample.place, entry_of(data.digest, row), row in skipped)

    def encoded(numbered: tuple[int, list[Sample]]) -> list[Text]:
        first, samples = numbered
        return [text(first + i, sample) for i, sample in enumerate(samples)]

    return ordered_map(encoded, _numbered(text_groups(store, data, shard)), 1)


def _numbered(groups: Iterator[list[Sample]]) -> Iterator[tuple[int, list[Sample]]]:
    first = 0
    for samples in groups:
        yield first, samples
        first += len(samples)


def _passes(groups: Iterator[list[Text]], num_tokens: int) -> Iterator[list[Text]]:
    """Rows in order, in parts of about `num_tokens`."""
    part: list[Text] = []
    size = 0
    for group in groups:
        for text in group:
            length = len(text.sample.input_ids) if text else 0
            if part and size + length > num_tokens:
                yield part
                part, size = [], 0
            part.append(text)
            size += length
    if part:
        yield part


def _scored(built: BlindBuilt, texts: list[Text]) -> list[Scores | None]:
    """Scores of `texts`, None for each None, 0 of what has no image (there q is p); what is not finite (of a sample that
    is skipped) as it is: it goes under a key that says nothing of what is skipped."""
    given = [text for text in texts if text is not None and text.pictured]
    scores = _scores(built, [text.sample for text in given]) if given else []
    if not all(map(is_finite, scores)):
        # one that is not finite spoils those that share its row: each alone
        scores = [score for text in given for score in _scores(built, [text.sample])]
        _check_finite(given, scores)
    found_of = iter(scores)

    def found(text: Text) -> Scores | None:
        if text is None:
            return None
        return next(found_of) if text.pictured else np.zeros((2, len(text.sample.targets)), np.float32)

    return [found(text) for text in texts]


def _scores(built: BlindBuilt, samples: list[TextSample]) -> list[Scores]:
    lengths = [len(sample.input_ids) for sample in samples]
    layout = first_fit(lengths, max(row_width(built.llm.base_model.config), *lengths))
    return packed_scores(built.llm, samples, layout, softcap=built.softcap, num_rows=built.num_softmax_rows)


def _check_finite(texts: list[_Text], scores: list[Scores]) -> None:
    """Raises: UserError where a q is not finite that stage 2 reads."""
    wrong = [text for text, found in zip(texts, scores, strict=True) if not is_finite(found)]
    told = next((text for text in wrong if not text.skipped), None)
    if told is None:
        return
    do = "are its weights?"
    if len(wrong) < len(texts):
        do += f" To go on without this sample, add {told.entry!r} to data.skip_ids"
    raise UserError(f"{told.place}: the LLM's q without the image is not finite; {do}")


# -- what is kept of a job that was broken off


def staging(task: BlindTask) -> str:
    """Where in the store the files of an unfinished artifact lie, under its key."""
    return f"checkpoints/{task.result.stage}-{task.result.key}"


def _stage(store: Store, task: BlindTask, folder: Path, name: str) -> None:
    store.upload(folder, staging(task), [name])
    store.write_json(f"{staging(task)}/{name}.json", digest_folder(folder, [name])[name])


def staged(store: Store, task: BlindTask) -> dict[str, dict[str, Any]]:
    """{name: size and SHA-256} of the files that are there as they were written; others do not count."""
    found = {n: _noted(store, task, n) for n in _without_json(store.list(staging(task)))}
    files = {name: entry for name, entry in found.items() if entry is not None}
    there = set(store.list(staging(task)))
    with tempfile.TemporaryDirectory() as tmp:
        store.download(staging(task), Path(tmp), [n for n in files if n in there])
        wrong = differences(Path(tmp), files)
    return {name: entry for name, entry in files.items() if name not in wrong}


def _without_json(names: Sequence[str]) -> list[str]:
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _noted(store: Store, task: BlindTask, name: str) -> dict[str, Any] | None:
    """What was written down of a staged file; None where that is damaged, so that the file is made again."""
    try:
        entry = store.read_json(f"{staging(task)}/{name}.json")
        return {"size_bytes": int(entry["size_bytes"]), "sha256": str(entry["sha256"])}
    except (BrokenJson, KeyError, TypeError, ValueError):
        return None


def _finish(
    task: BlindTask,
    store: Store,
    names: Sequence[str],
    meta: dict[str, Any],
    start: float,
    confirm: Callable[[], None],
) -> None:
    """Make the artifact of the staged files, and forget them."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        store.download(staging(task), folder, names)
        wrong = differences(folder, {name: store.read_json(f"{staging(task)}/{name}.json") for name in names})
        if wrong:
            raise UserError(
                f"{store.url(staging(task))}: {len(wrong)} of {len(names)} files are not what was written; run again, and "
                "they are computed anew" + "".join(f"\n  {name}: {text}" for name, text in wrong.items())
            )
        meta["wall_time_s"] = time.perf_counter() - start
        commit(store, task.result.stage, task.result.key, folder, inputs=task.inputs, meta=meta, confirm=confirm)
    confirm()
    store.delete(staging(task))
