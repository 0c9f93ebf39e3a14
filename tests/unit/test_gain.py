"""Is p - q counted right, and does the area under the curve say how well it tells visual words from others?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dpa_ray.engine.loop import HISTOGRAM_EVERY, ratios
from dpa_ray.model.gain import BINS, auc, counted, edges
from dpa_ray.model.step import StepSums
from tests.random_models import batch_of, make_step, make_vlm


def random_gains(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p - q, mostly near 0, larger where grounded; which are grounded; which count."""
    generator = torch.Generator().manual_seed(seed)
    grounded = torch.rand(num, generator=generator) < 0.3
    gain = (torch.randn(num, generator=generator) * 0.1).pow(3) + grounded * 0.2 * torch.rand(num, generator=generator)
    return gain.clamp(-1, 1), grounded, torch.rand(num, generator=generator) < 0.9


def test_counts_are_those_of_numpy() -> None:
    gain, grounded, counts = random_gains(5000, 0)
    found = counted(gain, grounded, counts).numpy()
    for row, kind in enumerate((~grounded, grounded)):
        expected, _ = np.histogram(gain[kind & counts].double().numpy(), edges())
        assert np.abs(found[row] - expected).sum() <= 2, "but for one on an edge"


def test_the_ends_are_in_the_outermost_bins() -> None:
    found = counted(
        torch.tensor([-1.0, 1.0, 0.0, -0.0]), torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    )
    assert found[0, 0] == found[0, -1] == 1
    assert found[0, BINS // 2] == 2
    assert found[1].sum() == 0
    assert edges()[[0, -1]].tolist() == [-1, 1]
    assert (np.diff(edges()) > 0).all()


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    gain, grounded, counts = random_gains(400, 1)
    found = auc(counted(gain, grounded, counts).numpy())
    seen, other = gain[grounded & counts].tolist(), gain[~grounded & counts].tolist()
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(seen, other)]
    assert found == pytest.approx(sum(right) / len(right), abs=0.01), "values of one bin are ties"
    assert 0.6 < found < 1


def test_the_area_of_what_is_told_apart_or_not() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    grounded = torch.tensor([True, True, False, False])
    assert auc(counted(torch.tensor([0.5, 0.4, 0.0, 0.1]), grounded, everything).numpy()) == 1
    assert auc(counted(torch.tensor([0.0, 0.1, 0.5, 0.4]), grounded, everything).numpy()) == 0
    assert auc(counted(torch.tensor([0.2, 0.2, 0.2, 0.2]), grounded, everything).numpy()) == 0.5
    assert auc(counted(torch.tensor([0.2, 0.3, 0.2, 0.2]), everything, everything).numpy()) is None


def test_a_step_counts_the_targets_of_samples_with_an_image() -> None:
    """And what it counts is what the weights are made of, for every kind of weight."""
    notations = ["s1 I g4", "s2 t6", "I t5"]
    for kind in ("prob", "logit"):
        sums = make_step(make_vlm(), kind).eval()(batch_of(notations))
        assert sums.gains.sum(1).tolist() == [5, 4]
    uniform = make_step(make_vlm(), "uniform").eval()(batch_of(notations))
    assert not uniform.gains.any()


def test_metrics_have_the_area_and_now_and_then_the_counts() -> None:
    sums = make_step(make_vlm(), "prob").eval()(batch_of(["s1 I g4", "I t5"]))
    again = StepSums.of_detached(sums.detached() + sums.detached())
    found = ratios(again, 18, HISTOGRAM_EVERY + 1)
    assert found["gain_auc"] == pytest.approx(auc(sums.gains.numpy()))
    assert sum(found["gain_histogram"]) == 18
    assert "gain_histogram" not in ratios(again, 18, HISTOGRAM_EVERY)
    plain = make_step(make_vlm(), "prob").eval()(batch_of(["I t5"]))
    assert "gain_auc" not in ratios(plain, 5, 1), "no visual word is known"
