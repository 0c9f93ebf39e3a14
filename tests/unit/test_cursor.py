"""Is every sample taken exactly once an epoch, at any seek, on any number of workers?"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ray.data.cursor import Cursor, permuted, shares

GROUPS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@st.composite
def cursors(draw):
    groups = draw(GROUPS)
    options = {
        "seed": draw(st.integers(0, 2**31)),
        "global_batch_size": draw(st.integers(1, 20)),
        "window": draw(st.integers(1, 40)),
        "fraction": draw(st.sampled_from([1.0, 0.9, 0.5, 0.1, 1e-6])),
        "order": draw(st.integers(0, 2)),
    }
    return groups, options


def epoch(cursor: Cursor, number: int) -> list[int]:
    return [int(r) for step in range(cursor.steps_per_epoch) for r in cursor.rows(number, step)]


@settings(max_examples=150, deadline=None)
@given(cursors(), st.integers(0, 5))
def test_every_sample_exactly_once_per_epoch(case, number):
    groups, options = case
    cursor = Cursor(groups, **options)
    taken = epoch(cursor, number)
    assert len(taken) == len(set(taken)) == cursor.num_samples == max(1, round(options["fraction"] * sum(groups)))
    assert set(taken) <= set(range(sum(groups)))
    sizes = [len(cursor.rows(number, step)) for step in range(cursor.steps_per_epoch)]
    assert all(size == options["global_batch_size"] for size in sizes[:-1])
    assert 1 <= sizes[-1] <= options["global_batch_size"]


@settings(max_examples=100, deadline=None)
@given(cursors(), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), min_size=1, max_size=6))
def test_a_step_computed_alone_equals_the_sequence(case, seeks):
    groups, options = case
    walker = Cursor(groups, **options)
    sequence = {(e, s): walker.rows(e, s).tolist() for e in range(4) for s in range(walker.steps_per_epoch)}
    seeker = Cursor(groups, **options)
    for number, step in seeks:
        place = (number, step % walker.steps_per_epoch)
        assert seeker.rows(*place).tolist() == sequence[place]
        assert Cursor(groups, **options).rows(*place).tolist() == sequence[place]


@settings(max_examples=50, deadline=None)
@given(cursors())
def test_a_fraction_is_the_same_subset_in_every_epoch(case):
    groups, options = case
    cursor = Cursor(groups, **options)
    assert set(epoch(cursor, 0)) == set(epoch(cursor, 1)) == set(epoch(cursor, 7))


@settings(max_examples=50, deadline=None)
@given(cursors())
def test_every_order_takes_the_same_subset(case):
    groups, options = case
    assert len({frozenset(epoch(Cursor(groups, **{**options, "order": order}), 0)) for order in range(3)}) == 1


def test_orders_have_nothing_to_do_with_each_other():
    """Of two orders of 4,096 samples in one window, places correlate as those of independent ones; no step is alike."""
    options = {"seed": 0, "global_batch_size": 8, "window": 8192}
    one, two = (Cursor([64] * 64, order=order, **options) for order in (0, 1))
    places = np.argsort(epoch(one, 0)), np.argsort(epoch(two, 0))
    assert abs(np.corrcoef(*places)[0, 1]) < 4 / np.sqrt(4096)
    shared = [len({*one.rows(0, s).tolist()} & {*two.rows(0, s).tolist()}) for s in range(one.steps_per_epoch)]
    assert sum(shared) < 30, "8 are expected"


@settings(max_examples=50, deadline=None)
@given(cursors(), st.integers(1, 40))
def test_the_order_does_not_depend_on_the_global_batch(case, other):
    groups, options = case
    one, two = (epoch(Cursor(groups, **{**options, "global_batch_size": g}), 2) for g in (3, other))
    assert one == two


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.integers(1, 40), st.integers(0, 3))
def test_a_window_holds_consecutive_row_groups_of_the_epochs_order(groups, window, number):
    cursor = Cursor(groups, seed=1, global_batch_size=1, window=window)
    of_row = np.repeat(np.arange(len(groups)), groups)
    taken = of_row[epoch(cursor, number)]
    last_window = {}
    first_window = {}
    for position, group in enumerate(taken):
        first_window.setdefault(int(group), position // window)
        last_window[int(group)] = position // window
    for group, size in enumerate(groups):  # a group lies in as many windows as it must, and never comes back
        assert last_window[group] - first_window[group] <= -(-size // window)


def test_epochs_and_seeds_differ():
    def order(seed: int, number: int) -> list[int]:
        return epoch(Cursor([64] * 10, seed=seed, global_batch_size=32, window=128), number)

    orders = [order(seed, number) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] != sorted(orders[0])
    chosen = [set(epoch(Cursor([64] * 10, seed=s, global_batch_size=8, window=99, fraction=0.3), 0)) for s in (0, 1)]
    assert chosen[0] != chosen[1]


def test_the_order_is_a_recorded_one():
    """Resuming relies on it: a change here makes other runs of what was begun before."""
    cursor = Cursor([4, 3, 5], seed=3, global_batch_size=5, window=8)
    assert [cursor.rows(1, step).tolist() for step in range(3)] == [[3, 1, 0, 4, 7], [6, 5, 2, 11, 10], [9, 8]]


def test_the_order_in_a_large_window_is_a_recorded_one():
    cursor = Cursor([64] * 40, seed=3, global_batch_size=6, window=2000, fraction=0.9)
    assert cursor.rows(1, 100).tolist() == [1540, 648, 369, 265, 2350, 2326]


@pytest.mark.parametrize("num", [1, 2, 3, 5, 1023, 1024, 1025, 1026, 1056, 1057, 4096, 4097, 65_536, 100_003])
def test_a_permutation_asked_at_places_has_each_number_once_and_the_same_at_any_place(num):
    whole = permuted(np.arange(num), num, 7, num)
    assert np.array_equal(np.sort(whole), np.arange(num))
    some = np.random.default_rng(num).integers(0, num, 50)
    assert np.array_equal(permuted(some, num, 7, num), whole[some])
    assert np.array_equal(np.concatenate([permuted(np.array([i]), num, 7, num) for i in some]), whole[some])


@pytest.mark.parametrize("num", [2, 3, 5, 1025, 1100, 2000])
def test_over_keys_every_number_is_as_likely_at_a_place_as_any_other(num):
    """Chi-squared, in at most 16 cells, of what the first, a middle and the last place hold, and of their distances."""
    first, middle, last = np.array([permuted(np.array([0, num // 2, num - 1]), num, 1, key) for key in range(3000)]).T
    samples = [(values, num) for values in (first, middle, last)]
    if num > 3:  # a distance is 1..num-1
        samples += [((b - a) % num - 1, num - 1) for a, b in ((first, middle), (middle, last), (first, last))]
    for values, kinds in samples:
        cells = min(16, kinds)
        expected = np.bincount(np.arange(kinds) * cells // kinds) * len(values) / kinds
        found = np.bincount(values * cells // kinds, minlength=cells)
        chi2 = ((found - expected) ** 2 / expected).sum()
        assert chi2 < cells - 1 + 5 * np.sqrt(2 * (cells - 1)) + 6


@pytest.mark.parametrize("num", [1025, 4096, 65_536, 100_003])
def test_neighbours_in_a_permutation_have_nothing_to_do_with_each_other(num):
    whole = permuted(np.arange(num), num, 5)
    for lag in (1, 2, 16, int(num**0.5), int(num**0.5) + 1):
        assert abs(np.corrcoef(whole[:-lag], whole[lag:])[0, 1]) < 4.5 / np.sqrt(num - lag)
    assert abs(np.corrcoef(whole, np.arange(num))[0, 1]) < 4.5 / np.sqrt(num)
    assert (np.abs(np.diff(whole)) == 1).sum() < 12, "2 are expected"
    assert (whole == np.arange(num)).sum() < 9, "1 is expected"


def test_rows_of_a_window_are_well_mixed():
    cursor = Cursor([64] * 100, seed=0, global_batch_size=64, window=6400)
    steps = [cursor.rows(0, step) for step in range(cursor.steps_per_epoch)]
    groups_per_step = np.mean([len(set((rows // 64).tolist())) for rows in steps])
    assert groups_per_step > 40  # 64 draws out of 100 groups meet 47.4 different ones on average
    assert abs(np.corrcoef(np.concatenate(steps), np.arange(6400))[0, 1]) < 0.05  # 4 standard errors of no correlation


def test_a_fraction_takes_from_all_parts_of_the_data():
    rows = np.array(epoch(Cursor([64] * 50, seed=3, global_batch_size=10, window=500, fraction=0.25), 0))
    per_group = np.bincount(rows // 64, minlength=50)
    assert per_group.min() == per_group.max() == 16


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_100_million_samples_take_less_than_100_mb_while_built_and_in_any_epoch(fraction):
    """All that is allocated on the way, not only what is kept. (tests/benchmarks/cursor.py shows the time of a step.)"""
    tracemalloc.start()
    try:
        cursor = Cursor([64] * 1_562_500, seed=0, global_batch_size=256, window=65_536, fraction=fraction)
        for number in (0, 1, 7, 0):
            for step in (0, cursor.steps_per_epoch // 2, cursor.steps_per_epoch - 1):
                assert len(set((cursor.rows(number, step) // 64).tolist())) > 100, "from many row groups"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


def test_a_fraction_of_rows_beyond_64_bit_products_is_spread_exactly():
    cursor = Cursor([2**32, 2**32], seed=0, global_batch_size=1, window=1, fraction=0.5)
    assert cursor.num_samples == 2**32
    assert cursor._counts.tolist() == [2**31, 2**31]


def test_the_subset_of_a_fraction_is_a_recorded_one():
    """Of row groups of unlike sizes, some of which give nothing: resuming relies on it too."""
    cursor = Cursor([4, 1, 7, 3, 1, 2], seed=5, global_batch_size=3, window=3, fraction=0.2)
    assert [cursor.rows(2, step).tolist() for step in range(2)] == [[16, 14, 3], [7]]


@pytest.mark.parametrize("step", [-1, 4])
def test_a_step_outside_the_epoch_is_an_error(step):
    with pytest.raises(IndexError, match=r"expected a step in 0..3"):
        Cursor([7], seed=0, global_batch_size=2, window=4).rows(0, step)


@pytest.mark.parametrize(("groups", "change"), [([], {}), ([0, 3], {}), ([3], {"fraction": 0}), ([3], {"window": 0})])
def test_wrong_arguments_are_errors(groups, change):
    with pytest.raises(ValueError, match="expected"):
        Cursor(groups, **{"seed": 0, "global_batch_size": 1, "window": 1, **change})


# -- shares


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 9))
def test_shares_hold_every_row_once_and_all_ranks_make_the_same_passes(num, world_size, micro):
    rows = np.arange(100, 100 + num)
    layout = shares(rows, world_size, micro)
    assert len(layout) == world_size
    assert sorted(int(r) for rank in layout for part in rank for r in part) == rows.tolist()
    assert len({len(rank) for rank in layout}) == 1
    assert len(layout[0]) >= 1
    assert all(len(part) <= micro for rank in layout for part in rank)
    totals = [sum(len(part) for part in rank) for rank in layout]
    assert max(totals) - min(totals) <= 1
    assert len(layout[0]) == max(1, -(-max(totals) // micro)), "no pass that is filler on every rank"


def test_a_global_batch_of_7_on_2_workers():
    assert [[len(p) for p in rank] for rank in shares(np.arange(7), 2, 4)] == [[4], [3]]
    assert [[len(p) for p in rank] for rank in shares(np.arange(7), 2, 3)] == [[3, 1], [3, 0]]


def test_more_workers_than_samples_leaves_filler():
    assert [[p.tolist() for p in rank] for rank in shares(np.array([5, 9]), 4, 2)] == [[[5]], [[9]], [[]], [[]]]


@settings(max_examples=100, deadline=None)
@given(
    cursors(),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_any_change_of_workers_between_any_two_steps_keeps_each_sample_once(case, attempts):
    """Attempts of (workers, micro-batch, steps) follow each other over two epochs, the last one to the end."""
    groups, options = case
    whole = Cursor(groups, **options)
    total = 2 * whole.steps_per_epoch
    taken: list[list[int]] = []
    for number, (world_size, micro, num_steps) in enumerate(attempts):
        cursor = Cursor(groups, **options)  # as a process that starts again makes it
        last = number == len(attempts) - 1
        for step in range(len(taken), total if last else min(total, len(taken) + num_steps)):
            layout = shares(cursor.rows(*divmod(step, cursor.steps_per_epoch)), world_size, micro)
            taken.append(sorted(int(r) for rank in layout for part in rank for r in part))
    assert taken == [sorted(whole.rows(*divmod(s, whole.steps_per_epoch)).tolist()) for s in range(total)]
    for number in (0, 1):
        rows = [r for s in taken[number * whole.steps_per_epoch :][: whole.steps_per_epoch] for r in s]
        assert len(rows) == len(set(rows)) == whole.num_samples


# Grouping


def image_or_text(seed: int, share: float):
    """Sizes as data/sizes.py gives them: 64 and more with an image."""

    def sizes(rows: np.ndarray) -> np.ndarray:
        mixed = (np.asarray(rows, np.uint64) * np.uint64(2654435761) + np.uint64(seed)) % np.uint64(2**32)
        pictured = mixed % np.uint64(1000) < share * 1000
        return (np.where(pictured, 64, 0) + (mixed // np.uint64(1000)) % np.uint64(64)).astype(np.uint8)

    return sizes


@settings(max_examples=150, deadline=None)
@given(cursors(), st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_grouped_every_sample_once_and_any_step_alone(case, number, share):
    groups, options = case
    options = {**options, "sizes": image_or_text(number, share), "one_image": 64}
    cursor = Cursor(groups, **options)
    taken = epoch(cursor, number)
    assert len(taken) == len(set(taken)) == cursor.num_samples
    for step in range(cursor.steps_per_epoch):
        rows = Cursor(groups, **options).rows(number, step)
        assert rows.tolist() == cursor.rows(number, step).tolist()
        assert (np.diff(options["sizes"](rows).astype(int)) <= 0).all()


@settings(max_examples=100, deadline=None)
@given(cursors(), st.integers(0, 5))
def test_grouped_windows_hold_the_same_samples_as_ungrouped(case, number):
    """Grouping reads nothing that a plain shuffle would not: windows keep their rows."""
    groups, options = case
    plain, grouped = Cursor(groups, **options), Cursor(groups, **options, sizes=image_or_text(0, 0.5), one_image=64)
    for index in range(-(-plain.num_samples // options["window"])):
        whole = plain._part(number, index, 0, options["window"])
        assert sorted(whole) == sorted(grouped._grouped(number, index, grouped._size_of))


def test_grouped_steps_are_all_with_or_all_without_images_but_one_a_window():
    sizes = image_or_text(3, 0.7)
    cursor = Cursor([64] * 64, seed=1, global_batch_size=32, window=1024, sizes=sizes, one_image=64)
    kinds = []
    for step in range(cursor.steps_per_epoch):
        pictured = sizes(cursor.rows(0, step)) >= 64
        kinds.append("mixed" if pictured.any() and not pictured.all() else "image" if pictured.all() else "text")
    assert kinds.count("mixed") <= 4  # windows
    assert 80 <= kinds.count("image") <= 96  # of 128
    runs = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    assert runs > 30  # in random order, not all images first


def test_grouped_passes_hold_samples_of_like_size_on_all_ranks():
    sizes = image_or_text(3, 1.0)
    options = {"seed": 1, "global_batch_size": 64, "window": 1024}
    grouped, plain = Cursor([64] * 16, **options, sizes=sizes, one_image=64), Cursor([64] * 16, **options)

    def spread(cursor: Cursor) -> float:
        layout = shares(cursor.rows(0, 2), world_size=2, micro_batch_size=4)
        return max(float(np.ptp(sizes(rows).astype(int))) for ranks in layout for rows in ranks)

    assert spread(grouped) <= 12 < 40 < spread(plain)


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("window", [1500, 4096, 5000])
def test_large_windows_take_every_sample_once_whatever_the_number_of_workers(window: int, fraction: float) -> None:
    """Beyond 1,024 rows a window's permutation is asked at single places; group sizes and steps divide nothing."""
    groups = np.random.default_rng(window).integers(1, 65, 330).tolist()
    cursor = Cursor(groups, seed=3, global_batch_size=37, window=window, fraction=fraction)
    assert cursor.num_samples == round(fraction * sum(groups))
    for epoch in range(2):
        steps = [cursor.rows(epoch, step) for step in range(cursor.steps_per_epoch)]
        taken = np.concatenate(steps)
        assert len(np.unique(taken)) == len(taken) == cursor.num_samples
        assert 0 <= taken.min() <= taken.max() < sum(groups)
        fresh = Cursor(groups, seed=3, global_batch_size=37, window=window, fraction=fraction)
        for step in (cursor.steps_per_epoch - 1, 0, cursor.steps_per_epoch // 2):
            assert np.array_equal(fresh.rows(epoch, step), steps[step]), "any step alone, in any order"
        for rows in steps[::20]:
            for world_size in (1, 2, 3, 5):
                dealt = [row for rank in shares(rows, world_size, 4) for part in rank for row in part]
                assert sorted(dealt) == sorted(rows)
    whole = [set(np.concatenate([cursor.rows(e, s) for s in range(cursor.steps_per_epoch)])) for e in range(2)]
    assert whole[0] == whole[1], "a fraction is the same subset in every epoch"
    assert not np.array_equal(cursor.rows(0, 0), cursor.rows(1, 0))
