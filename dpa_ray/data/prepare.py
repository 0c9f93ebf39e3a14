"""How does a source become shards? Part by part, each the same whoever makes it; the manifest is written last.

data/<digest>/part-00000.parquet ...   one shard a part (none where all of its rows are in quarantine)
data/<digest>/parts/00000.json ...     what is done, until the manifest is there: a killed attempt goes on from it
data/<digest>/sizes.uint8                how large each row is: what every reader that groups by length asks for
data/<digest>/quarantine.jsonl         {id, place, reason, detail} of the rows that cannot be used
data/<digest>/manifest.json            no manifest, no data

Each source of a mixture is prepared so, under its own digest; the mixture's folder has a manifest alone, which names them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.catalog import Piece, digest, pieces, source_digest
from dpa_ray.data.known import Known
from dpa_ray.data.prepared import SCHEMA_VERSION, SIZES_FILE, Prepared, StoreLike, find_prepared, sealed
from dpa_ray.data.ray_tasks import bounded_retries, deaths_told, quiet_ray_data
from dpa_ray.data.retry import bridged_s, bridging
from dpa_ray.data.sample import Sample
from dpa_ray.data.shard_file import footer_sha256
from dpa_ray.data.shards import write_shard
from dpa_ray.data.sizes import footer_text, from_text, in_footer
from dpa_ray.data.sources import Part, Rejected, Scan, Source
from dpa_ray.errors import UserError
from dpa_ray.recipe import DEFAULT_RETRY_S, SourceSection

__all__ = ["Known", "Prepared", "find_prepared", "prepare", "source_digest"]

IN_PROCESS_ROWS = 5_000
"""Up to so many rows are prepared in the calling process, without Ray."""

_PROGRESS_S = 5.0
_DEATH_HINT = "each takes one CPU of a node; give the nodes more, and start again: the parts that are done are kept"


def prepare(
    store: StoreLike,
    section: SourceSection,
    *,
    max_quarantined_fraction: float,
    report: Callable[[str], None] = lambda message: None,
    ray_is_ready: Callable[[], bool] | None = None,
    retry_s: float = DEFAULT_RETRY_S,
    limit_name: str = "data.max_quarantined_fraction",
) -> Prepared:
    """Prepare `section`'s data in `store`, unless it is there already; of a mixture, each source that is not.

    More than IN_PROCESS_ROWS rows go to Ray Data tasks, one a part, if Ray is running (else they are prepared here, the
    same way); `ray_is_ready`, asked at that point only, may start it. `report` is given a line now and then. An S3 outage
    of `retry_s` seconds only delays. `limit_name` is what the user knows `max_quarantined_fraction` by.

    Raises: UserError where the source cannot be read, or more than `max_quarantined_fraction` of it cannot be used (what
    is done is kept, the manifest is not written).
    """
    store = BridgedStore(store)
    options = (_Limit(max_quarantined_fraction, limit_name), report, ray_is_ready or _ray_is_running)
    with bridging(retry_s):
        found = pieces(section, Known(store))
        prepared = [_prepare(store, piece, *options) for piece in found]
        if len(found) == 1 and found[0].times == 1:
            return prepared[0]
        mixture = _mix(store, found)
    report(f"data {mixture.digest}: {mixture.num_rows:,} samples an epoch, mixed of {len(found)} sources")
    return mixture


def _mix(store: StoreLike, found: list[Piece]) -> Prepared:
    """The mixture of prepared pieces, its manifest written if it is not there."""
    name = digest(found)
    manifest = {
        "schema": SCHEMA_VERSION,
        "digest": name,
        "mixture": [
            {"digest": piece.scan.digest, "times": piece.times, "source": piece.entry.model_dump(mode="json")}
            for piece in found
        ],
    }
    if not store.exists(f"data/{name}/manifest.json"):
        store.write_json(f"data/{name}/manifest.json", sealed(manifest))
    mixture = find_prepared(store, name)
    assert mixture is not None
    return mixture


@dataclass(frozen=True)
class _Limit:
    """How much of a source may be in quarantine, and the setting's name."""

    fraction: float
    name: str


def _prepare(
    store: StoreLike,
    piece: Piece,
    limit: _Limit,
    report: Callable[[str], None],
    ray_is_ready: Callable[[], bool],
) -> Prepared:
    """One source. Raises: UserError."""
    source, scan = piece.source, piece.scan
    folder = f"data/{scan.digest}"
    found = find_prepared(store, scan.digest)
    if found is not None:
        manifest = store.read_json(f"{folder}/manifest.json")
        _check_quarantine(store, folder, Counter(manifest["quarantined"]), scan.num_rows, limit)
        report(f"data {scan.digest}: {found.num_rows:,} samples, prepared before")
        return found
    report(f"data {scan.digest}: preparing {scan.num_rows:,} samples of {piece.entry.source}")
    started, results = time.monotonic(), []
    for result in _results(store, source, scan, report, ray_is_ready):
        results.append(result)
        done = sum(r["num_source_rows"] for r in results)
        rate = done / max(1e-3, time.monotonic() - started)
        if len(scan.parts) > 1:
            report(f"data {scan.digest}: {done:,} of {scan.num_rows:,} samples, {rate:,.0f}/s")
    results.sort(key=lambda result: result["index"])
    rejected = [line for result in results for line in result["quarantine"]]
    reasons = Counter(line["reason"] for line in rejected)
    lines = "".join(json.dumps(line) + "\n" for line in rejected)
    store.write_bytes(f"{folder}/quarantine.jsonl", lines.encode())
    _check_quarantine(store, folder, reasons, scan.num_rows, limit)
    shards = [result["shard"] for result in results if result["shard"] is not None]
    for name in store.list(folder):  # of an attempt that was killed
        if name not in {shard["name"] for shard in shards} | {"quarantine.jsonl"} and not name.startswith("parts/"):
            store.delete(f"{folder}/{name}")
    manifest = {
        "schema": SCHEMA_VERSION,
        "digest": scan.digest,
        "source": piece.entry.model_dump(mode="json", exclude={"weight"}),
        "source_name": source.name,
        "num_source_rows": scan.num_rows,
        "num_rows": sum(sum(shard["rows"]) for shard in shards),
        "num_with_system": sum(result["num_with_system"] for result in results),
        "num_quarantined": len(rejected),
        "quarantined": dict(sorted(reasons.items())),
        "shards": shards,
        "sizes": _write_sizes(store, folder, results),
    }
    store.write_json(f"{folder}/manifest.json", sealed(manifest))
    store.delete(f"{folder}/parts")
    prepared = find_prepared(store, scan.digest)
    assert prepared is not None
    seconds = time.monotonic() - started
    report(
        f"data {scan.digest}: {prepared.num_rows:,} samples in {len(shards)} shards, {len(rejected):,} in quarantine, "
        f"{scan.num_rows / max(1e-3, seconds):,.0f}/s"
    )
    return prepared


def _write_sizes(store: StoreLike, folder: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The sizes of all rows, in order, as one file; returns what the manifest says of it."""
    sizes = bytearray()
    for result in results:
        shard, text = result["shard"], result.pop("sizes", None)
        if shard is None:
            continue
        if text is None:  # done by an older version
            sizes += in_footer(store, folder, shard["name"], sum(shard["rows"]), shard["footer_sha256"]).tobytes()
        else:
            sizes += from_text(text).tobytes()
    data = bytes(sizes)
    store.write_bytes(f"{folder}/{SIZES_FILE}", data)
    return {"name": SIZES_FILE, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _check_quarantine(store: StoreLike, folder: str, reasons: Counter[str], num_rows: int, limit: _Limit) -> None:
    """Raises: UserError where more of the source is in quarantine than allowed, or all of it."""
    num = sum(reasons.values())
    if num <= limit.fraction * num_rows and num < num_rows:
        return
    counts = "\n".join(f"  {reason}: {count:,}" for reason, count in reasons.most_common())
    raise UserError(
        f"{num:,} of {num_rows:,} samples cannot be used; expected at most {limit.fraction:.2%} "
        f"({limit.name}){' and one that can be' if num == num_rows else ''}:\n{counts}\n"
        f"each with its place and reason: {store.url(folder)}/quarantine.jsonl"
    )


def _results(
    store: StoreLike, source: Source, scan: Scan, report: Callable[[str], None], ray_is_ready: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """The result of each part, in any order; parts done before are not done again, unless they put rows in quarantine
    (somebody may have mended an image since)."""
    folder = f"data/{scan.digest}"
    done = set(store.list(f"{folder}/parts"))
    todo = []
    for part in scan.parts:
        before = store.read_json(f"{folder}/parts/{part.index:05}.json") if f"{part.index:05}.json" in done else None
        if before is not None and not before["quarantine"]:
            yield before
        else:
            todo.append(part)
    if scan.num_rows > IN_PROCESS_ROWS and len(todo) > 1 and ray_is_ready():
        yield from _with_ray(store, source, folder, todo)
        return
    for part in todo:
        yield prepare_part(store, source, folder, part, report)


def prepare_part(
    store: StoreLike, source: Source, folder: str, part: Part, report: Callable[[str], None]
) -> dict[str, Any]:
    """Make the shard of `part`, put it into the store, and its result beside it, last; returns the result.

    Memory holds a row group, the images under way and the part's records without images.
    """
    name = f"part-{part.index:05}.parquet"
    rejected: list[Rejected] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="dpa_ray-") as temporary:
        path = Path(temporary) / name
        rows = _timed(source.read(part), part, source.name, report)
        groups = write_shard(path, _usable(rows, rejected, counts))
        shard = sizes = None
        if groups:
            store.upload(Path(temporary), folder, [name])
            shard = {
                "name": name, "rows": groups, "size_bytes": path.stat().st_size, "sha256": _sha256(path),
                "footer_sha256": footer_sha256(path),
            }  # fmt: skip
            sizes = footer_text(path)
    result = {
        "index": part.index,
        "num_source_rows": part.num_chosen,
        "num_with_system": counts["system"],
        "shard": shard,
        "sizes": sizes,
        "quarantine": [
            {"id": r.id, "place": source.name + r.place, "reason": r.reason, "detail": r.detail} for r in rejected
        ],
    }
    store.write_json(f"{folder}/parts/{part.index:05}.json", result)
    return result


def _usable(
    rows: Iterable[tuple[int, Sample | Rejected]], rejected: list[Rejected], counts: Counter[str]
) -> Iterator[tuple[int, Sample]]:
    for row, sample in rows:
        if isinstance(sample, Rejected):
            rejected.append(sample)
            continue
        counts["system"] += any(turn.role == "system" for turn in sample.turns)
        yield row, sample


def _timed(
    rows: Iterator[tuple[int, Sample | Rejected]], part: Part, name: str, report: Callable[[str], None]
) -> Iterator[tuple[int, Sample | Rejected]]:
    """`rows`, with a line every few seconds."""
    started = last = time.monotonic()
    for done, item in enumerate(rows, 1):
        yield item
        now = time.monotonic()
        if now - last >= _PROGRESS_S:
            last = now
            where = f"rows {part.first_row:,} to {part.first_row + part.num_rows:,}"
            report(
                f"{name or 'builtin'}: {done:,} of {part.num_chosen:,} samples ({where}), {done / (now - started):,.0f}/s"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- Ray


def _ray_is_running() -> bool:
    import ray

    return bool(ray.is_initialized())


def _with_ray(store: StoreLike, source: Source, folder: str, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Each part in a Ray Data task of one CPU, as many at once as the cluster has; only results come back."""
    import ray

    retry_s = bridged_s()

    def run(row: dict[str, Any]) -> dict[str, str]:
        try:
            with bridging(retry_s):
                result = prepare_part(store, source, folder, parts[int(row["id"])], lambda message: None)
        except UserError as err:  # as a value: an exception would come back as a traceback
            return {"result": "", "error": str(err)}
        return {"result": json.dumps(result), "error": ""}

    data = ray.data.range(len(parts), override_num_blocks=len(parts))
    quiet_ray_data(data.context)
    with bounded_retries() as options:
        made = data.map(run, num_cpus=1, **options)
    with deaths_told(f"the processes that prepare {source.name or 'the data'}", _DEATH_HINT):
        for row in made.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield json.loads(row["result"])
