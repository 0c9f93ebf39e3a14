"""Does a noisy series rise, or bounce, that should fall? From means of blocks of several lengths, so that neither the noise
of single steps nor the length of the stage decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

LENGTHS = (10, 20, 40, 80, 160)
"""Steps of a block: short ones see a quick bounce of a large size, long ones a slow rise of a small one."""

ERRORS = 7.0
"""Standard errors of a difference of two blocks that count: many pairs are looked at, and steps are not quite
independent of each other."""

LEAST_RISE = 0.03
"""Of the series' own size: what is less is not worth a message, whatever the statistics say."""

WINDOW, LEAST_WINDOW, EXCESS = 24, 5, 8.0
"""Of the last so many blocks: their distance from the falling curve that fits best is, in squares, so many times what
their noise explains (1 for steps independent of each other, 3 where neighbours have a correlation of 0.3)."""

SCATTER_LENGTH, SCATTER_FACTOR = 40, 3.0
"""A bounce within a block shows as scatter: so many times the least that an earlier block of this length had."""

_MAD_TO_SD = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Rise:
    """A block that lies higher than an earlier one; `before` and `after` are their means."""

    length: int
    low: int  # index of the lowest block
    before: float
    after: float
    step_before: int  # the middles of the blocks, counted from 1
    step_after: int
    noise: float  # standard deviation of a single step
    bounces: bool  # it had risen and fallen before, or its scatter grew


@dataclass
class _Blocks:
    """Means and noise of the blocks of one length; noise by the differences of neighbours, in which a trend hardly counts.

    Steps with and without images are of two sizes, of which a median of differences says little; of their mean square a
    lone outlier can be the most. More scatter must show in both.
    """

    length: int
    means: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)  # by the mean square
    usual: list[float] = field(default_factory=list)  # by the median

    def add(self, values: Sequence[float]) -> None:
        self.means.append(sum(values) / len(values))
        steps = [abs(b - a) for a, b in pairwise(values)]
        self.noise.append(math.sqrt(sum(step * step for step in steps) / len(steps) / 2))
        self.usual.append(_MAD_TO_SD * median(steps) / math.sqrt(2))

    def error(self, first: int, last: int) -> float:
        """Standard error of a difference of two blocks, by the noise of all from one to the other: of one alone it is known
        too little, and the lowest block is one of many."""
        span = self.noise[first : last + 1]
        return math.sqrt(sum(noise * noise for noise in span) / len(span) * 2 / self.length)

    def rise(self) -> Rise | None:
        """The last two blocks above the lowest earlier one, both by more than noise."""
        if len(self.means) < 3:
            return None
        low = min(range(len(self.means) - 2), key=lambda b: self.means[b])
        before, after = self.means[low], min(self.means[-2:])
        last = len(self.means) - 1
        if after - before <= max(ERRORS * self.error(low, last), LEAST_RISE * abs(before)):
            return None
        return self._found(low, last, before, self.means[-1], self._has_bounced(low))

    def _has_bounced(self, low: int) -> bool:
        """Had it risen and fallen again before the lowest block?"""
        fit = falling_fit(self.means[: low + 1])
        return any(
            abs(mean - level) > ERRORS * self.error(b, low)
            for b, (mean, level) in enumerate(zip(self.means, fit, strict=False))
        )

    def excess(self) -> Rise | None:
        """The last blocks, far from every falling curve."""
        num = min(WINDOW, len(self.means) // 2)
        if num < LEAST_WINDOW:
            return None
        fit = falling_fit(self.means)
        distance = sum((mean - level) ** 2 for mean, level in zip(self.means[-num:], fit[-num:], strict=True)) / num
        explained = sum(noise * noise for noise in self.noise[-num:]) / num / self.length
        if distance <= max(EXCESS * explained, (LEAST_RISE / 2 * abs(fit[-1])) ** 2):
            return None
        first, last = len(self.means) - num, len(self.means) - 1
        low = min(range(first, last), key=lambda b: self.means[b])
        high = max(range(low + 1, last + 1), key=lambda b: self.means[b])
        came_down = self.means[high] - self.means[last] > ERRORS * self.error(high, last)
        return self._found(low, high, self.means[low], self.means[high], came_down or self._has_bounced(low))

    def scatter(self) -> Rise | None:
        """The last two blocks scatter more than an earlier one did."""
        if len(self.means) < 4:
            return None
        quiet = min(range(len(self.means) - 2), key=lambda b: self.noise[b])
        last = len(self.means) - 1
        for noise in (self.noise, self.usual):
            if min(noise[-2:]) <= SCATTER_FACTOR * max(min(noise[:-2]), LEAST_RISE / 3 * abs(self.means[quiet])):
                return None
        return self._found(quiet, last, self.means[quiet], self.means[-1], bounces=True)

    def _found(self, low: int, last: int, before: float, after: float, bounces: bool) -> Rise:
        middle = [b * self.length + self.length // 2 for b in (low, last)]
        return Rise(
            self.length, low, before, after, middle[0], middle[1], max(self.noise[low], self.noise[last]), bounces
        )


def falling_fit(values: Sequence[float]) -> list[float]:
    """The falling sequence nearest to `values` in squares (isotonic regression, by pooling adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean and number of each
    for value in values:
        mean, num = value, 1
        while pools and pools[-1][0] < mean:
            before, num_before = pools.pop()
            mean, num = (before * num_before + mean * num) / (num_before + num), num_before + num
        pools.append((mean, num))
    return [mean for mean, num in pools for _ in range(num)]


class Trend:
    """One series, a number a step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._blocks = [_Blocks(length) for length in LENGTHS]

    def add(self, value: float) -> Rise | None:
        """Take the next step's number; a rise, where one shows now."""
        self.values.append(value)
        found = None
        for blocks in self._blocks:
            if len(self.values) % blocks.length == 0:
                blocks.add(self.values[-blocks.length :])
                found = found or blocks.rise() or blocks.excess()
                if blocks.length == SCATTER_LENGTH:
                    found = found or blocks.scatter()
        return found

    def fell(self, rise: Rise) -> tuple[float, float] | None:
        """(before, after) of this series in the blocks of another's `rise`, where it fell meanwhile by more than noise."""
        blocks = next(b for b in self._blocks if b.length == rise.length)
        last = len(blocks.means) - 1
        before, after = blocks.means[rise.low], blocks.means[last]
        least = max(ERRORS / 2 * blocks.error(rise.low, last), LEAST_RISE * abs(before))
        return (before, after) if before - after > least else None
