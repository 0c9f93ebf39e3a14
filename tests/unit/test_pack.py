"""Are samples laid into rows as narrow and as few as is cheap, each in one place, and into no row too long?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ray.pack import LINEAR_COST, pack


def width(lengths, rows):
    return max(sum(lengths[i] for i in row) for row in rows)


def cost(num_rows, row_width):
    return num_rows * row_width * (LINEAR_COST + row_width)


def test_by_hand():
    assert pack([6, 10, 4], max_length=10) == [[1], [0, 2]]  # no padding at the width of the longest
    assert pack([6, 5, 4], max_length=100) == [[0, 1, 2]]  # 15 slots, against 18 in two or three rows
    assert pack([6, 6, 6], max_length=100) == [[0], [1], [2]]  # nothing to save
    assert pack([5], max_length=5) == [[0]]
    assert pack([2, 1, 1], max_length=2) == [[0], [1, 2]]


def test_rows_do_not_grow_where_attention_would_cost_more_than_padding():
    """Eight of 4096 tokens: one row of 32768 is 8 times the attention, without any padding to save."""
    assert pack([4096] * 8, max_length=2**16) == [[i] for i in range(8)]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="at most 8 tokens, found one of 9"):
        pack([3, 9], max_length=8)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=24), st.integers(300, 4000))
def test_each_sample_in_one_row_and_never_dearer_than_unpacked(lengths, max_length):
    rows = pack(lengths, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    assert width(lengths, rows) <= max_length
    assert cost(len(rows), width(lengths, rows)) <= cost(len(lengths), max(lengths))


def test_captions_of_varied_length_pack_tightly():
    """ShareGPT4V-like lengths: padding is a third of the slots unpacked, and at most 5 % packed."""
    generator = np.random.default_rng(0)
    used = slots = padded = 0
    for _ in range(200):
        lengths = np.clip(generator.lognormal(5.1, 0.4, 8), 8, 2000).astype(int).tolist()
        rows = pack(lengths, 8192)
        used, slots = used + sum(lengths), slots + len(rows) * width(lengths, rows)
        padded += len(lengths) * max(lengths)
    assert used / padded < 0.67
    assert used / slots > 0.95
