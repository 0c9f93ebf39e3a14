"""How do prepared shards become a stream of batches? Ray tasks read, decode and encode; batches come in order.

`Loader.load` is the whole of it without Ray: any micro-batch, by the numbers of its rows, on its own. `stream` runs it
ahead of its consumer. Nothing is replayed and nothing has a position: resuming is asking for a shorter list.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpa_ray.batch import NO_TURN, Arrays, Batch, Encoded
from dpa_ray.data import kept, ray_tasks, wire
from dpa_ray.data.blind_scores import BlindScores
from dpa_ray.data.collate import collate
from dpa_ray.data.encode import Encoder
from dpa_ray.data.images import ImageError, decode
from dpa_ray.data.pixels import Geometry, levels, pixel_shape
from dpa_ray.data.prepared import Prepared, StoreLike
from dpa_ray.data.retry import bridging, first_line, retried
from dpa_ray.data.sample import Sample
from dpa_ray.data.shard_file import open_shard, read_footer
from dpa_ray.data.shards import SCHEMA, from_row
from dpa_ray.data.skip import entry_of
from dpa_ray.data.threads import LruBytes, ordered_map
from dpa_ray.errors import UserError
from dpa_ray.pack import pack

T = TypeVar("T")

MicroBatch = tuple[np.ndarray, int]
"""(rows of its samples, none for a filler; the row to make a filler of)."""


class MicroBatches(Protocol):
    """Micro-batches in their order, and how many they are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


CACHE_BYTES = 128 * 2**20
"""Row groups that a process keeps, because the rows of a shuffle window lie in the same ones."""

TASK_CPUS = 0.25
"""What a decode task books: little, so that tasks fit beside training workers that book nearly all CPUs there are."""

DEATH_HINT = "lower data.workers (tasks at once) or data.prefetch_batches (batches made ahead), or give the nodes more"

BLOCK_BYTES = 4 * 2**20
MAX_BLOCK_BATCHES = 8
"""Small micro-batches are made several to a task: each task costs the caller and Ray's own processes about a millisecond."""

_OPEN_SHARDS = 16
_FOOTER_BYTES = 256 * 2**20
"""Of footers that are kept of closed shards: a window's rows lie in all of them (a million images: about 170 MB)."""
ROWS_AT_ONCE = 64
"""Of which the row groups are in memory together."""
READS_AT_ONCE = 8
"""Shards that one process reads from at once: a micro-batch's rows lie anywhere, and a request takes tens of milliseconds."""
_BYTES_PER_TOKEN = 30  # of a Batch's tensors
_USUAL_TOKENS = 1024


@dataclass
class Loader:
    """Micro-batches of one prepared source. Picklable; what it has read stays in its process.

    `image_processor` is a transformers image processor (its Geometry is kept), None where `encoder` leaves images out (template "text").
    Row numbers are those of the cursor: 0 to prepared.num_rows - 1. `packing` lays a micro-batch's samples into rows
    without padding (see pack.py). `blind` has q of every target, computed beforehand. Of the rows `skipped` nothing
    reaches the model: they keep their place in a batch with one token that is no target. `can_skip`: is the data trained on,
    so that `data.skip_ids` can name its samples? `with_images`: else images are not even read.
    """

    store: StoreLike
    prepared: Prepared
    encoder: Encoder
    image_processor: Any
    pad_token_id: int
    packing: bool = False
    cache_bytes: int = CACHE_BYTES
    retry_s: float = 0.0  # an S3 outage as long only delays
    blind: BlindScores | None = None
    skipped: frozenset[int] = frozenset()
    can_skip: bool = True
    with_images: bool = True
    _reader: _Reader | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.image_processor is not None:
            self.image_processor = Geometry.of(self.image_processor)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def check(self) -> None:
        """Raises: UserError where the tokenizer's template cannot take data like this."""
        self.encoder.check(system=self.prepared.num_with_system > 0)

    def samples(self, rows: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples of `rows`. Raises: UserError, naming shard and row, where one cannot be read."""
        if self._reader is None:
            self._reader = _Reader(self.store, self.prepared, self.cache_bytes, with_images=self.with_images)
        with bridging(self.retry_s):
            return self._reader.samples([int(row) for row in rows])

    def load(self, rows: np.ndarray, filler_row: int) -> Batch:
        """The micro-batch of `rows`; of none, a filler: `filler_row` without targets, counted nowhere."""
        return Batch.of(self.arrays(rows, filler_row))

    def arrays(self, rows: np.ndarray, filler_row: int) -> Arrays:
        """`load` without torch."""
        is_filler = len(rows) == 0
        wanted = [filler_row] if is_filler else [int(row) for row in rows]
        samples = self.samples(wanted)
        passed_over = [row in self.skipped for row in wanted]
        encoded = [
            self._stand_in() if out else self._or_skip(row, self.encoder, s)
            for row, s, out in zip(wanted, samples, passed_over, strict=True)
        ]
        if self.blind is not None:
            with bridging(self.retry_s):
                for row, sample, e, out in zip(wanted, samples, encoded, passed_over, strict=True):
                    if not out:
                        self.blind.join(row, e, sample.place)
        images = [
            array
            for row, s, e in zip(wanted, samples, encoded, strict=True)
            for array in self._or_skip(row, self._pixels, s, e)
        ]
        arrays = collate(
            encoded,
            images,
            pad_token_id=self.pad_token_id,
            image_token_id=self.encoder.image_token_id,
            rows=[] if is_filler else [(self.prepared.digest, row) for row in wanted],
            ids=[] if is_filler else [sample.id for sample in samples],
            num_filler=1 if is_filler else 0,
            image_shape=pixel_shape(self.image_processor),
            layout=pack([len(e.input_ids) for e in encoded], self.encoder.max_length) if self.packing else None,
            pixel_scale=None if self.image_processor is None else self.image_processor.scale,
        )
        if not is_filler:
            arrays["places"] = [sample.place for sample in samples]
            arrays["num_skipped"] = sum(passed_over)
            arrays["num_tokens"] -= sum(passed_over)
            arrays["untaught"] = [
                (row, sample.id, sample.place)
                for row, sample, e, out in zip(wanted, samples, encoded, passed_over, strict=True)
                if not out and not e.target.any()
            ]
        return arrays

    def _or_skip(self, row: int, make: Callable[..., T], *of: Any) -> T:
        """What `make` makes of `row`'s sample. Raises: UserError with its message, and how to go on without the sample."""
        try:
            return make(*of)
        except UserError as err:
            if not self.can_skip:
                raise UserError(f"{err}; this sample is held out: mend it there, or take it out") from None
            entry = entry_of(self.prepared.digest, row)
            raise UserError(f"{err}; to go on without this sample, add {entry!r} to data.skip_ids") from None

    def _stand_in(self) -> Encoded:
        """What the model is given of a skipped sample: a token that pads other samples anyway. A number that is not
        finite would come through from the sample itself, even without targets: 0 times it is not 0."""
        no, turn = np.zeros(1, bool), np.full(1, NO_TURN, np.int32)
        blind = None if self.blind is None else np.zeros((2, 1), np.float32)
        return Encoded(np.array([self.pad_token_id], np.int64), no, turn, no, num_images=0, blind=blind)

    def _pixels(self, sample: Sample, encoded: Encoded) -> list[np.ndarray]:
        if encoded.num_images and self.image_processor is None:
            raise ValueError(f"{sample.place}: expected an image processor for {encoded.num_images} images, found none")
        try:
            images = [decode(image.data) for image in sample.images[: encoded.num_images]]
        except ImageError as err:
            raise UserError(f"{sample.place}: an image that was prepared does not decode: {err}") from None
        return [levels(image, self.image_processor) for image in images]

    def batch_bytes(self, num_rows: int) -> int:
        """About what a batch of `num_rows` samples of usual length with one image each takes."""
        image = int(np.prod(pixel_shape(self.image_processor)))  # a byte a value
        return batch_bytes(num_rows, image, self.encoder.max_length)


class _Reader:
    """Rows of a prepared source, by row groups, of which it keeps the latest; `with_images`: else without reading them."""

    def __init__(self, store: StoreLike, prepared: Prepared, cache_bytes: int, *, with_images: bool = True):
        self._store, self._prepared, self._cache_bytes = store, prepared, cache_bytes
        self._columns = None if with_images else [name for name in SCHEMA.names if name != "images"]
        self._ends = np.cumsum(prepared.row_groups)
        self._places = [(s, g) for s, (_, groups) in enumerate(prepared.shards) for g in range(len(groups))]
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()  # those that no thread is reading from
        self._lock = threading.Lock()
        self._footers = LruBytes(_FOOTER_BYTES)
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._size = 0

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """In the order of `rows`. Row groups that lie in several shards are read at once: a store may be far away."""
        for row in rows:
            if not 0 <= row < self._prepared.num_rows:
                raise IndexError(f"expected a row in 0..{self._prepared.num_rows - 1}, found {row}")
        found: list[Sample] = []
        for some in (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)):
            groups = [int(group) for group in np.searchsorted(self._ends, some, side="right")]
            tables = self._tables(groups)
            found += [self._sample(row, group, tables[group]) for row, group in zip(some, groups, strict=True)]
        return found

    def _sample(self, row: int, group: int, table: pa.Table) -> Sample:
        offset = row - int(self._ends[group] - table.num_rows)
        source_name = self._prepared.shard_source(self._places[group][0])
        return from_row({"images": [], **table.slice(offset, 1).to_pylist()[0]}, source_name)

    def _tables(self, wanted: Sequence[int]) -> dict[int, pa.Table]:
        """The row groups `wanted`, kept for later as far as there is room."""
        found = {group: self._groups[group] for group in wanted if group in self._groups}
        missing: dict[int, list[int]] = {}
        for group in dict.fromkeys(wanted):
            if group not in found:
                missing.setdefault(self._places[group][0], []).append(group)
        read = self._read_all
        at_once = min(READS_AT_ONCE, len(missing))
        for part in ordered_map(read, missing.values(), at_once) if at_once > 1 else map(read, missing.values()):
            found |= part
        for group, table in found.items():
            if group not in self._groups:
                self._size += table.nbytes
            self._groups[group] = table
            self._groups.move_to_end(group)
        while self._size > self._cache_bytes and len(self._groups) > 1:
            self._size -= self._groups.popitem(last=False)[1].nbytes
        return found

    def _read_all(self, groups: list[int]) -> dict[int, pa.Table]:
        """Row groups of one shard."""
        return {group: self._read_group(*self._places[group]) for group in groups}

    def _read_group(self, shard: int, index: int) -> pa.Table:
        rows = self._prepared.shards[shard][1]
        try:
            table = retried(lambda: self._read(shard, index), self._url(shard))
        except (OSError, pa.ArrowException) as err:
            if "AWS Error " in str(err):  # the server's refusal says nothing of the shard
                raise UserError(f"{self._url(shard)} cannot be read: {first_line(err)}") from None
            raise self._broken(shard, f"row group {index} cannot be read: {err}") from None
        if table.num_rows != rows[index]:
            raise self._broken(shard, f"expected {rows[index]} rows in row group {index}, found {table.num_rows}")
        return table

    def _read(self, shard: int, index: int) -> pa.Table:
        with self._lock:
            file = self._files.pop(shard, None)
        try:
            file = file or self._open(shard)
            table = file.read_row_group(index, columns=self._columns, use_threads=False)
        except OSError:  # an open file may keep what failed
            self._footers.drop(str(shard))
            raise
        with self._lock:
            self._files[shard] = file
            closed = self._files.popitem(last=False)[1] if len(self._files) > _OPEN_SHARDS else None
        if closed is not None:
            closed.close(force=True)
        return table

    def _open(self, shard: int) -> pq.ParquetFile:
        system, root = self._store.arrow()
        expected = self._prepared.sizes_bytes[shard]
        try:
            opened = system.open_input_file(
                f"{root}/{self._prepared.shard_folder(shard)}/{self._prepared.shards[shard][0]}"
            )
        except FileNotFoundError:
            raise self._broken(shard, f"expected {expected} bytes, found no file") from None
        if (found := opened.size()) != expected:
            raise self._broken(shard, f"expected {expected} bytes, found {found}")
        footer = self._footers.get(str(shard))
        if footer is None:
            footer = read_footer(opened, self._prepared.footers[shard])
            self._footers.put(str(shard), footer)
        return open_shard(opened, footer=footer)

    def _broken(self, shard: int, problem: str) -> UserError:
        folder = self._store.url(self._prepared.shard_folder(shard))
        return UserError(f"{self._url(shard)}: {problem}; delete {folder} to have the data prepared again")

    def _url(self, shard: int) -> str:
        return self._store.url(f"{self._prepared.shard_folder(shard)}/{self._prepared.shards[shard][0]}")


def batch_bytes(num_rows: int, image_bytes: int, max_length: int) -> int:
    """About what a batch of `num_rows` samples of usual length takes, with one image of `image_bytes` each."""
    return num_rows * (image_bytes + min(max_length, _USUAL_TOKENS) * _BYTES_PER_TOKEN)


def batches_per_task(num_bytes: int) -> int:
    """Micro-batches of `num_bytes` that one task makes."""
    return int(np.clip(BLOCK_BYTES // num_bytes, 1, MAX_BLOCK_BATCHES))


def stream(loader: Loader, micro_batches: Iterable[MicroBatch], *, prefetch: int, workers: int) -> Iterator[Batch]:
    """The batches of `micro_batches`, in order: see `packed_stream`."""
    for packed in packed_stream(loader, micro_batches, prefetch=prefetch, workers=workers):
        yield wire.loads(packed)


def packed_stream(
    loader: Loader, micro_batches: Iterable[MicroBatch], *, prefetch: int, workers: int
) -> Iterator[wire.Packed]:
    """The batches of `micro_batches`, in order, made by Ray tasks ahead of the caller.

    At most `workers` tasks run at once, and prefetch + workers are asked for and not taken: as far ahead `micro_batches`
    are asked for too; the first is taken for the largest. Ray must be running; called in a Ray Train worker, the tasks
    run on nodes without GPUs where there are some, else on any. Raises: UserError with a task's own message.
    """
    import ray

    if not ray.is_initialized():
        raise RuntimeError("expected Ray to be initialised before stream()")
    which = kept.digest(loader), [ray.put(loader)]
    wanted = iter(micro_batches)
    leading = list(islice(wanted, 1))
    batch_bytes = loader.batch_bytes(max([1, *(len(rows) for rows, _ in leading)]))
    blocks = _blocks(chain(leading, wanted), batches_per_task(batch_bytes), workers)
    task = ray.remote(num_returns=2, num_cpus=TASK_CPUS, max_retries=ray_tasks.TASK_RETRIES)(_load)
    places = ray_tasks.CpuNodesFirst(TASK_CPUS)
    asked: deque[Any] = deque()
    ends: deque[Any] = deque(maxlen=workers)

    def ask(num_blocks: int) -> None:
        """A task for each of the next blocks; it waits until the one `workers` before it is at its end."""
        for block in islice(blocks, num_blocks):
            there = task.options(scheduling_strategy=places.next())
            made, end = there.remote(which, block, ends[0] if len(ends) == workers else None)
            asked.append(made)
            ends.append(end)

    ask(prefetch + workers)
    while asked:
        with ray_tasks.deaths_told("the processes that decode and encode", DEATH_HINT):
            made = ray.get(asked[0])
        asked.popleft()
        ask(1)
        for tensors, rest, error in made:
            if error:
                raise UserError(error)
            yield tensors, rest


def _blocks(micro_batches: Iterator[MicroBatch], per_block: int, num_first: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches, `per_block` to a task, but the first few alone, to begin soon."""
    number = 0
    while block := list(islice(micro_batches, 1 if number < num_first else per_block)):
        number += 1
        yield block


def _load(
    which: tuple[str, list[Any]], block: list[MicroBatch], before: None
) -> tuple[list[tuple[Any, str, str]], None]:
    """Some micro-batches, in a worker process (the loader is fetched once per process), and what the next task awaits."""
    loader = kept.loader(*which)
    made: list[tuple[Any, str, str]] = []
    for rows, filler_row in block:
        try:
            tensors, rest = wire.dumps(loader.arrays(rows, filler_row))
            made.append((np.frombuffer(tensors, np.uint8), rest, ""))  # an array is not copied into a pickle
        except UserError as err:  # as a value: an exception would come back as a traceback
            made.append((None, "", str(err)))
            break
    return made, None
