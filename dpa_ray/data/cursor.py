"""Which samples does step s of epoch e take? A windowed shuffle, computed from the seed alone, at any place at once.

The order of an epoch: permute the row groups; cut their sequence into windows of about `window` rows; permute the rows
inside each window. A window is then all that a reader has to have at hand, and each row group is needed in one window
(at most two, where it lies across a border). Nothing is replayed: step s is rows [s*G, (s+1)*G) of that order.

Permutations come from an integer hash, so that the order depends on no library's generator and no platform: those of
row groups sort by it; those of a window's rows can be asked for single places, so that a step makes only its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1024  # row groups looked into at once: of few samples in each, a window holds many
_SORTED = 1024  # up to so many, a permutation is sorted whole: as fast as asking for places, and of any quality wanted
_ROUNDS = 8
_GROUPS, _ROWS, _SUBSET_GROUPS, _SUBSET_ROWS, _STEPS = range(5)  # what a hash is for, so that no two uses share one


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer over uint64, in place: a bijection, so that equal hashes mean equal input."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _keys(*parts: int | np.ndarray) -> np.ndarray:
    """(n,) uint64: a key from whole numbers, each of which matters; n of them where a part is (n,), else one."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, np.ndarray):
            key = _mix(key + (part.astype(np.uint64) * np.uint64(2) + _GOLDEN))
        else:
            key = _mix(key + np.uint64((part * 2 + int(_GOLDEN)) & _MASK))
    return key


def _hashes(num: int, key: np.ndarray) -> np.ndarray:
    """(..., num) uint64 of keys (..., 1): what the permutation of 0..num-1 that belongs to a key sorts by."""
    numbers = np.arange(1, num + 1, dtype=np.uint64)
    numbers *= _GOLDEN
    return _mix(numbers ^ key)


def permutation(num: int, *key: int) -> np.ndarray:
    """(num,) int64: a permutation of 0..num-1 that belongs to the key."""
    return np.argsort(_hashes(num, _keys(*key)))  # no two hashes are equal: any way of sorting gives the same


def permuted(places: np.ndarray, num: int, *key: int) -> np.ndarray:
    """(n,) int64: what a permutation of 0..num-1 that belongs to the key has at `places` (n,), in time and memory of n.

    A Feistel network on the numbers of a grid of about sqrt(num) x sqrt(num) cells: each round shifts one coordinate by
    a hash of the other. What falls on one of the few cells past `num` goes through again until it does not.
    """
    if num <= _SORTED:
        return permutation(num, *key)[places]
    width = math.isqrt(num - 1) + 1
    height = -(-num // width)
    rounds = _hashes(_ROUNDS, _keys(*key))
    numbers = _shifted(places.astype(np.uint64), width, height, rounds)
    while len(outside := np.flatnonzero(numbers >= np.uint64(num))):
        numbers[outside] = _shifted(numbers[outside], width, height, rounds)
    return numbers.astype(np.int64)


def _shifted(numbers: np.ndarray, width: int, height: int, rounds: np.ndarray) -> np.ndarray:
    """(n,) uint64: once through the network of `permuted`, a bijection of 0..width*height-1."""
    one, other = np.divmod(numbers, np.uint64(width))
    size, other_size = np.uint64(height), np.uint64(width)
    for key in rounds:  # an even number of them: the coordinates end where they began
        one += _mix((other + np.uint64(1)) * _GOLDEN ^ key) % size
        one %= size
        one, other, size, other_size = other, one, other_size, size
    return one * np.uint64(width) + other


class Cursor:
    """(seed, epoch, step, global batch) -> samples, whatever the number of workers.

    `row_groups` holds the number of rows of each row group of the prepared shards, in order; rows are numbered through
    all of them. `fraction` keeps round(fraction * rows) samples, at least one: a subset that the seed chooses, spread
    evenly over the row groups, the same in every epoch. Memory is a few numbers per row group.

    `order` tells orders of the same samples apart: stages that share data and seed must not share the order (what comes
    last in one stage is what the next one's LLM knows least, and its loss would rise for that alone).

    `sizes` (rows to numbers, from `one_image` on with an image) groups: inside a window, steps are as far as possible
    all with or all without images, and the rows of a step come largest first, so that `shares` puts like beside like
    in a pass and on all ranks at once. That is LLaVA's `group_by_modality_length`, whose megabatch is the global batch:
    lengths lay a step out, they do not choose its samples.
    """

    def __init__(
        self,
        row_groups: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        window: int,
        fraction: float = 1.0,
        order: int = 0,
        sizes: Callable[[np.ndarray], np.ndarray] | None = None,
        one_image: int = 0,
    ):
        num_of = np.asarray(row_groups, dtype=np.int64)
        num_rows = int(num_of.sum())
        if num_rows <= 0 or (num_of <= 0).any():
            raise ValueError(f"expected row groups of at least one row each, found {num_rows} rows in {len(num_of)}")
        if global_batch_size < 1 or window < 1 or not 0 < fraction <= 1:
            raise ValueError(
                f"expected global_batch_size >= 1, window >= 1 and fraction in (0, 1], found {global_batch_size}, "
                f"{window} and {fraction}"
            )
        self.seed, self.global_batch_size, self.window = seed, global_batch_size, window
        self._size_of, self._one_image = sizes, one_image
        self._first = order << 32  # of the numbers that stand for this order's epochs in hashes
        self.num_samples = max(1, round(fraction * num_rows))
        self.steps_per_epoch = -(-self.num_samples // global_batch_size)
        self._group_rows = num_of
        self._starts = np.cumsum(num_of) - num_of
        self._counts = self._spread(self.num_samples)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, permuted groups, their ends in samples
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def _spread(self, num: int) -> np.ndarray:
        """How many samples each row group gives, `num` in all, in proportion to its rows."""
        total = int(self._group_rows.sum())
        if num == total:
            return self._group_rows
        order = permutation(len(self._group_rows), self.seed, _SUBSET_GROUPS)
        upto = np.cumsum(
            self._group_rows[order]
        )  # then in place: an array of 100 million samples' row groups is 12.5 MB
        if total * num < 2**63:
            upto *= num
            upto //= total
        else:
            upto = np.fromiter((int(end) * num // total for end in upto), np.int64, len(upto))
        upto[1:] -= upto[:-1]
        counts = np.empty_like(upto)
        counts[order] = upto
        return counts

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups in the order of `epoch`, and where each one's samples end in it."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # before memory is taken for the next
            groups = permutation(len(self._group_rows), self.seed, _GROUPS, self._first + epoch)
            self._epoch = (epoch, groups, np.cumsum(self._counts[groups]))
        return self._epoch[1], self._epoch[2]

    def _members(self, groups: np.ndarray) -> np.ndarray:
        """The rows that `groups` give, by their global numbers: one group after the other, in order inside each.

        Works on len(groups) x the largest group, which is small: prepared shards bound both rows and bytes of a group.
        """
        sizes, counts = self._group_rows[groups, None], self._counts[groups, None]
        rows = np.arange(sizes.max())
        taken = rows < sizes
        if (counts < sizes).any():
            hashes = _hashes(len(rows), _keys(self.seed, _SUBSET_ROWS, groups)[:, None])
            hashes[~taken] = _MASK
            last = np.take_along_axis(np.sort(hashes, axis=1), counts - 1, axis=1)
            taken &= hashes <= last
        return (self._starts[groups, None] + rows)[taken]

    def _rows_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at `places` of the epoch's samples, as they are before the rows of windows are permuted."""
        order, ends = self._order(epoch)
        position = np.searchsorted(ends, places, side="right")
        groups = order[position]
        within = places - (ends[position] - self._counts[groups])
        if self._counts is self._group_rows:
            return self._starts[groups] + within
        some, which = np.unique(groups, return_inverse=True)
        members = np.concatenate([self._members(some[i : i + _BLOCK]) for i in range(0, len(some), _BLOCK)])
        counts = self._counts[some]
        return members[(np.cumsum(counts) - counts)[which] + within]

    def _part(self, epoch: int, index: int, start: int, stop: int) -> np.ndarray:
        """The rows `start` to `stop` of window `index` in the order in which `epoch` takes them, not grouped."""
        first = index * self.window
        num = min(self.window, self.num_samples - first)
        places = permuted(np.arange(start, min(stop, num)), num, self.seed, _ROWS, self._first + epoch, index)
        return self._rows_at(epoch, first + places)

    def _grouped(self, epoch: int, index: int, size_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The whole of window `index`, grouped: which step a row is in depends on all the others."""
        cached = self._windows.get((epoch, index))
        if cached is not None:
            return cached
        rows = self._part(epoch, index, 0, self.window)
        pictured = size_of(rows) >= self._one_image
        rows = self._by_modality(rows, index * self.window, pictured, self._first + epoch, index)
        while len(self._windows) >= 2:  # a step may lie across two
            del self._windows[next(iter(self._windows))]
        self._windows[epoch, index] = rows
        return rows

    def _by_modality(self, rows: np.ndarray, start: int, pictured: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Window `index`, which begins at sample `start` of the epoch, with its whole steps all with or all without
        images; what is left over fills one step and the parts of steps that neighbouring windows share."""
        size = self.global_batch_size
        head = min(-start % size, len(rows))
        num_whole = (len(rows) - head) // size
        uniform: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for part in (rows[pictured], rows[~pictured]):
            whole = len(part) // size
            uniform += [part[i * size : (i + 1) * size] for i in range(whole)]
            rest.append(part[whole * size :])
        order = permutation(len(uniform), self.seed, _STEPS, epoch, index)
        rest += [uniform[i] for i in order[num_whole:]]
        left = np.concatenate(rest)
        steps = [uniform[i] for i in order[:num_whole]]
        mixed = num_whole - len(steps)
        steps += [left[head + i * size : head + (i + 1) * size] for i in range(mixed)]
        steps = [steps[i] for i in permutation(num_whole, self.seed, _STEPS, epoch, index, 1)]
        return np.concatenate([left[:head], *steps, left[head + mixed * size :]])

    def num_rows(self, step: int) -> int:
        """How many samples step `step` (0-based) of any epoch takes: the global batch, or what is left of the epoch."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """(b,) int64: the rows of step `step` (0-based) of `epoch`, grouped: largest first; the last may be short."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"expected a step in 0..{self.steps_per_epoch - 1}, found step {step} of epoch {epoch}")
        start = step * self.global_batch_size
        stop = start + self.num_rows(step)
        parts = []
        while start < stop:
            index, offset = divmod(start, self.window)
            if self._size_of is None:
                part = self._part(epoch, index, offset, offset + stop - start)
            else:
                part = self._grouped(epoch, index, self._size_of)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        rows = np.concatenate(parts)
        if self._size_of is None:
            return rows
        return rows[np.argsort(-self._size_of(rows).astype(np.int64), kind="stable")]


def num_passes(num_rows: int, world_size: int, micro_batch_size: int) -> int:
    """How many micro-batches every rank makes of a step of `num_rows` samples: at least one."""
    if world_size < 1 or micro_batch_size < 1:
        raise ValueError(f"expected world_size and micro_batch_size >= 1, found {world_size} and {micro_batch_size}")
    return max(1, -(-num_rows // (world_size * micro_batch_size)))


def shares(rows: np.ndarray, world_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """One step's rows laid out over the ranks: [rank][pass] -> rows, the same number of passes (>= 1) on every rank.

    Ranks' totals differ by at most one; an empty array stands for a pass of filler.
    """
    num = num_passes(len(rows), world_size, micro_batch_size)
    layout = []
    for rank in range(world_size):
        own = rows[rank::world_size]
        layout.append([own[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num)])
    return layout
