"""The gradient noise scale where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.rules.noise import NoiseScale

DIMENSIONS, PART = 50, 4


def simulated(steps: int, whole: int, seed: int = 0) -> tuple[NoiseScale, float]:
    """The estimate after so many steps, and the truth: tr(Sigma) / |mu|^2."""
    draw = np.random.default_rng(seed)
    mean = draw.standard_normal(DIMENSIONS) * 0.2
    deviation = np.exp(draw.standard_normal(DIMENSIONS) * 0.5)
    scale = NoiseScale()
    for _ in range(steps):
        samples = mean + deviation * draw.standard_normal((whole, DIMENSIONS))
        part = float(np.linalg.norm(samples[:PART].mean(axis=0)))
        scale.observe(part, PART, float(np.linalg.norm(samples.mean(axis=0))), whole)
    return scale, float((deviation**2).sum() / (mean**2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_is_within_five_percent_of_the_truth_after_2000_steps(seed):
    scale, truth = simulated(2000, whole=32, seed=seed)
    assert scale.value == pytest.approx(truth, rel=0.05)


def test_both_moments_are_those_of_the_definition():
    scale = NoiseScale()
    scale.observe(3.0, 1.0, 2.0, 4.0)
    assert scale.signal == pytest.approx((4 * 4 - 1 * 9) / 3)
    assert scale.noise == pytest.approx((9 - 4) / (1 - 1 / 4))
    assert scale.value == pytest.approx(scale.noise / scale.signal)


def test_moments_are_averaged_apart_and_divided_last():
    scale = NoiseScale()
    scale.observe(3.0, 1.0, 2.0, 4.0)
    scale.observe(5.0, 1.0, 4.0, 4.0)
    signal = ((16 - 9) / 3 + (64 - 25) / 3) / 2
    noise = (5 / 0.75 + 9 / 0.75) / 2
    assert scale.value == pytest.approx(noise / signal)


def test_it_is_not_known_before_anything_was_measured_or_while_the_signal_is_not_above_0():
    scale = NoiseScale()
    assert math.isnan(scale.value)
    scale.observe(10.0, 1.0, 1.0, 4.0)
    assert scale.signal < 0
    assert math.isnan(scale.value)


@pytest.mark.parametrize(
    "step",
    [
        (math.nan, 1, 1.0, 4),
        (1.0, 1, math.inf, 4),
        (0.0, 1, 1.0, 4),
        (1.0, 4, 1.0, 4),
        (1.0, 0, 1.0, 4),
        (65536.0, 1, 1.0, 4),  # one of them is still multiplied by a loss scale
    ],
)
def test_what_cannot_be_used_changes_nothing(step):
    scale = NoiseScale()
    scale.observe(3.0, 1.0, 2.0, 4.0)
    before = scale.state_dict()
    scale.observe(*step)
    assert scale.state_dict() == before


def test_a_restored_estimate_goes_on():
    scale, _ = simulated(50, whole=8)
    again = NoiseScale.of(scale.state_dict())
    for one in (scale, again):
        one.observe(3.0, 4, 2.0, 8)
    assert again.value == scale.value
