"""Is a rise or a bounce seen through noise, and is a noisy curve that falls never taken for one?

The curves are drawn at random, with noise of every kind that training has: normal, heavy-tailed, skewed, of two sizes
(steps with and without images), and of neighbours with a correlation of up to 0.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpa_ray.report.trend import Rise, Trend, falling_fit

NUM_SERIES = 1000
NOISES = ("normal", "heavy", "skewed", "two sizes", "correlated")

Generator = np.random.Generator


def noise(rng: Generator, num: int) -> np.ndarray:
    """(num,) of standard deviation 1, about, of a kind that `rng` chooses."""
    normal = rng.normal(size=num)
    kind = NOISES[rng.integers(len(NOISES))]
    if kind == "heavy":
        return rng.standard_t(3, size=num) / np.sqrt(3)
    if kind == "skewed":
        return (np.exp(0.8 * normal) - np.exp(0.32)) / 1.3
    if kind == "two sizes":
        return np.where(rng.random(num) < rng.uniform(0.2, 0.8), -0.9, 0.9) + 0.3 * normal
    if kind == "correlated":
        share = rng.uniform(0.05, 0.3)
        for i in range(1, num):
            normal[i] = share * normal[i - 1] + np.sqrt(1 - share**2) * normal[i]
    return normal


def falling(rng: Generator) -> np.ndarray:
    """A curve that falls, in one of four forms, some after a flat warm-up; noise of 0.5 to 20 % of it."""
    num = int(np.exp(rng.uniform(np.log(40), np.log(2000))))
    t = np.arange(num) / num
    start, rate, form = rng.uniform(1.5, 12), rng.uniform(1, 15), rng.integers(4)
    floor = start * rng.uniform(0.15, 0.95)
    if form == 0:
        shape = np.exp(-rate * t)
    elif form == 1:
        shape = (1 + 10 * rate * t) ** -rng.uniform(0.3, 1)
    elif form == 2:
        shape = 1 - t ** rng.uniform(0.5, 2)
    else:  # epochs, each of which begins lower
        epochs = rng.integers(2, 5)
        shape = np.exp(-rate * t / 3) * (1 - 0.15 * np.floor(t * epochs) / epochs)
    if rng.random() < 0.3:
        shape = np.where(t < 0.05, 1, shape)
    curve = floor + (start - floor) * shape
    size = curve if rng.random() < 0.5 else curve.mean()
    return curve + rng.uniform(0.005, 0.2) * size * noise(rng, num)


def wrong(rng: Generator, kind: str) -> np.ndarray:
    """A curve that falls for 20 to 60 % of its steps, then rises or bounces by 10 to 60 % (and four times its noise)."""
    num = int(np.exp(rng.uniform(np.log(150), np.log(2000))))
    steps = np.arange(num)
    t, turn = steps / num, rng.uniform(0.2, 0.6)
    start = rng.uniform(1.5, 8)
    floor = start * rng.uniform(0.2, 0.9)
    curve = floor + (start - floor) * np.exp(-8 * t)
    low = curve[int(turn * num)]
    scatter = rng.uniform(0.005, 0.1) * low
    size = max(rng.uniform(0.1, 0.6) * low, 4 * scatter)
    if kind == "rise":
        after = low + size * (np.clip(t - turn, 0, None) / (1 - turn)) ** rng.uniform(0.5, 1.5)
    else:
        period = np.exp(rng.uniform(np.log(20), np.log(num * (1 - turn) / 2)))
        phase = steps / period
        forms: tuple[Any, ...] = (np.sin(2 * np.pi * phase) / 2 + 0.5, phase % 1, phase % 1 < 0.5)
        after = curve + size * forms[rng.integers(3)]
    return np.where(t > turn, after, curve) + scatter * noise(rng, num)


def first_rise(series: np.ndarray) -> tuple[int, Rise] | None:
    trend = Trend()
    for step, value in enumerate(series.tolist(), 1):
        if (rise := trend.add(value)) is not None:
            return step, rise
    return None


def test_falling_noisy_curves_alarm_nobody() -> None:
    """In at most 1 % of them."""
    alarms = [seed for seed in range(NUM_SERIES) if first_rise(falling(np.random.default_rng(seed)))]
    assert len(alarms) <= 0.01 * NUM_SERIES, alarms


@pytest.mark.parametrize("kind", ["rise", "bounce"])
def test_what_rises_or_bounces_is_seen(kind: str) -> None:
    """In at least 95 % of them."""
    num = NUM_SERIES // 2
    missed = [seed for seed in range(num) if not first_rise(wrong(np.random.default_rng(10_000 + seed), kind))]
    assert len(missed) <= 0.05 * num, missed


def test_a_constant_with_noise_does_not_rise() -> None:
    """A curve that has come to its end, which is where most steps of a long stage are: at most 1 %."""
    rng = np.random.default_rng(0)
    assert sum(first_rise(2 + 0.3 * noise(rng, 1000)) is not None for _ in range(200)) <= 2


def test_what_is_told_of_a_rise_by_hand() -> None:
    """20 steps at 3, 20 at 2, 20 at 2.5, without noise: seen at step 60, when both last blocks of ten lie higher."""
    found = first_rise(np.repeat([3.0, 2.0, 2.5], 20))
    assert found is not None
    step, rise = found
    assert step == 60
    assert (rise.length, rise.before, rise.after, rise.bounces) == (10, 2.0, 2.5, False)
    assert (rise.step_before, rise.step_after) == (25, 55)


def test_a_rise_too_small_to_matter_is_none() -> None:
    assert first_rise(np.repeat([3.0, 2.0, 2.04], 40)) is None
    assert first_rise(np.repeat([3.0, 2.0, 2.08], 40)) is not None


def test_more_and_more_scatter_is_a_bounce() -> None:
    """Up and down at every step, more and more: no block's mean rises."""
    steps = np.arange(400)
    found = first_rise(2 + np.where(steps < 200, 0.03, 0.4) * (-1.0) ** steps + 0.01 * np.sin(steps))
    assert found is not None
    assert found[1].bounces


def test_the_falling_fit_by_hand() -> None:
    assert falling_fit([5, 3, 4, 1, 2, 2]) == pytest.approx([5, 3.5, 3.5, 5 / 3, 5 / 3, 5 / 3])
    assert falling_fit([3, 2, 1]) == [3, 2, 1]
    assert falling_fit([1, 2, 3]) == [2, 2, 2]


def test_another_series_falls_meanwhile_or_does_not() -> None:
    rising, falls, stays = Trend(), Trend(), Trend()
    rng = np.random.default_rng(0)
    fell = []
    for step in range(200):
        falls.add(3 - 0.005 * step + 0.05 * rng.normal())
        stays.add(3 + 0.05 * rng.normal())
        rise = rising.add(2 + max(0, step - 100) * 0.01 + 0.05 * rng.normal())
        if rise is not None:
            assert step > 100
            assert stays.fell(rise) is None
            fell.append(falls.fell(rise))
    assert fell[-1] is not None
    before, after = fell[-1]
    assert 3 > before > after > 2
