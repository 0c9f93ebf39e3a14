"""How are the samples of one pass laid into rows without padding? In as many rows, as wide, as cost least to compute.

Only the samples of a pass (at most `micro_batch_size`) share its rows: what a step takes, how many passes it makes and
how many samples a pass holds are known before any length is, so that the ranks need not agree on anything, and a pass
never holds more tokens than it does unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence

LINEAR_COST = 4096
"""What the linear layers do to one token, in positions of attention: 6 x the width (24 D^2 against 4 T D operations in
a decoder layer), for the narrowest LLMs in use (D about 700). With a mask, attention computes a row's whole square."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of sample numbers, at most `max_length` tokens each; every sample in one row, in rising order.

    For each number of rows, MULTIFIT (Coffman, Garey and Johnson 1978): the narrowest width at which first-fit-decreasing
    needs no more. Of these, the one that costs least. Raises: ValueError where a sample is longer than `max_length`.
    """
    longest = max(lengths, default=0)
    if longest > max_length:
        raise ValueError(f"expected samples of at most {max_length} tokens, found one of {longest}")
    best = first_fit(lengths, longest)
    least = _cost_of(len(best), _width(lengths, best)) if best else 0
    for num_rows in range(1, len(best)):
        if _cost_of(num_rows, max(longest, -(-sum(lengths) // num_rows))) >= least:
            continue  # not even rows without a gap would cost less
        rows = _narrowest(lengths, num_rows, max_length)
        if rows is not None and (cost := _cost_of(len(rows), _width(lengths, rows))) < least:
            best, least = rows, cost
    return [sorted(row) for row in best]


def _narrowest(lengths: Sequence[int], num_rows: int, max_length: int) -> list[list[int]] | None:
    """At most `num_rows` rows of the smallest width that a bisection finds, or None where `max_length` is too narrow."""
    found = first_fit(lengths, max_length)
    if len(found) > num_rows:
        return None
    low, high = max(max(lengths), -(-sum(lengths) // num_rows)), min(max_length, sum(lengths))
    while low < high:
        middle = (low + high) // 2
        rows = first_fit(lengths, middle)
        if len(rows) <= num_rows:
            found, high = rows, middle
        else:
            low = middle + 1
    return found


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit-decreasing: each sample, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, left in enumerate(room) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def _width(lengths: Sequence[int], rows: list[list[int]]) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


def _cost_of(num_rows: int, width: int) -> int:
    return num_rows * width * (LINEAR_COST + width)
