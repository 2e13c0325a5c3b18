"""The baseline against NumPy's own median, and what it takes in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.rules.baseline import EARLY, FAR, REFRESH, YOUNG, Band, Baseline, median_and_mad

BAND = Band(z=6.0, times=4.0, floor=0.25, warmup=50, window=128)


def noise(steps: int, layers: int = 1, sigma: float = 0.4, seed: int = 0) -> np.ndarray:
    return sigma * np.random.default_rng(seed).standard_normal((steps, layers))


def taught(values_TL: np.ndarray, band: Band = BAND) -> Baseline:
    baseline = Baseline(values_TL.shape[1], band)
    for y_L in values_TL:
        baseline.accept(y_L)
        baseline.end_record()
    return baseline


def reference(values: np.ndarray) -> tuple[float, float]:
    center = float(np.median(values))
    return center, max(1.4826 * float(np.median(np.abs(values - center))), BAND.floor)


@given(st.lists(st.lists(st.floats(-700, 700), min_size=7, max_size=7), min_size=1, max_size=5))
def test_median_and_mad_are_those_of_numpy(rows):
    values = np.array(rows)
    center, mad = median_and_mad(values)
    assert center.tolist() == np.median(values, axis=1).tolist()
    expected = 1.4826 * np.median(np.abs(values - center[:, None]), axis=1)
    assert mad.tolist() == expected.tolist()


def test_the_bound_is_that_of_the_last_window_of_accepted_values():
    values = noise(300)
    baseline = taught(values)
    baseline.refresh()
    center, scale = reference(values[-128:, 0])
    assert baseline.center_L[0] == center
    assert baseline.bound_L[0] == pytest.approx(center + 6 * scale, rel=1e-12)
    assert baseline.calm_L[0] == pytest.approx(center + 3 * scale, rel=1e-12)


def test_a_baseline_is_never_older_than_a_refresh():
    values = noise(400)
    baseline = Baseline(1, BAND)
    for t, y_L in enumerate(values):
        recent = [reference(values[max(0, i - 128) : i, 0])[0] for i in range(t, t - REFRESH, -1)
                  if i >= EARLY]  # fmt: skip
        if recent:
            assert baseline.center_L[0] in recent
        baseline.accept(y_L)
        baseline.end_record()


def test_times_is_asked_for_as_well():
    baseline = taught(noise(200), Band(z=6.0, times=50.0, floor=0.25, warmup=50, window=128))
    assert baseline.bound_L[0] == pytest.approx(baseline.center_L[0] + math.log(50))


def test_nothing_is_abnormal_to_a_blind_layer():
    baseline = taught(noise(EARLY - 1))
    assert baseline.bound_L[0] == np.inf


def test_an_early_layer_is_judged_by_a_hundred_times_its_median():
    values = noise(EARLY + 1)
    baseline = taught(values)
    assert baseline.bound_L[0] == pytest.approx(np.median(values) + math.log(FAR))


def test_a_value_enters_winsorised_from_above_only():
    values = noise(200)
    baseline = taught(values)
    center, scale = reference(values[-128:, 0])
    baseline.refresh()
    for y in (20.0, -20.0):
        baseline.accept(np.array([y]))
    kept = baseline.arrays()["values"][0]
    assert kept.max() == pytest.approx(center + 6 * scale)
    assert kept.min() == -20.0


def test_layers_take_values_in_each_at_its_own_pace():
    values = noise(600, layers=3)
    baseline = Baseline(3, BAND)
    every = np.array([1, 2, 7])
    for t, y_L in enumerate(values):
        baseline.accept(y_L, t % every == 0)
        baseline.end_record()
    baseline.refresh()
    for layer, step in enumerate(every):
        accepted = values[::step, layer][-128:]
        assert baseline.center_L[layer] == pytest.approx(np.median(accepted), abs=1e-12)


def test_the_baseline_from_before_a_change_judges_until_the_new_one_is_warm():
    values = noise(200)
    baseline = taught(values)
    baseline.begin_anew(wary=False)
    center, bound = baseline.center_L[0], baseline.bound_L[0]
    for count in range(1, BAND.warmup + REFRESH):
        assert baseline.bound_L[0] == bound or count > BAND.warmup
        baseline.accept(np.array([center + 1.0]))
        baseline.end_record()
    assert baseline.center_L[0] == pytest.approx(center + 1.0)


def test_a_wary_layer_asks_for_a_hundred_times_its_median_for_one_warm_up():
    baseline = taught(noise(200))
    baseline.begin_anew(wary=True)
    center = baseline.center_L[0]
    for _ in range(BAND.warmup):
        assert baseline.bound_L[0] == pytest.approx(center + math.log(FAR))
        baseline.accept(np.array([center + 2.0]))
        baseline.end_record()
    assert baseline.center_L[0] == pytest.approx(center + 2.0)
    assert baseline.bound_L[0] == pytest.approx(center + 2.0 + 6 * BAND.floor + math.log(YOUNG))


def test_while_its_window_is_not_full_a_layer_may_go_twice_as_high():
    baseline = Baseline(1, BAND)
    for count in range(1, BAND.window + REFRESH + 1):
        baseline.accept(np.array([1.0]))
        baseline.end_record()
        if count == BAND.window - REFRESH:
            assert baseline.bound_L[0] == pytest.approx(1.0 + 6 * BAND.floor + math.log(YOUNG))
    assert baseline.bound_L[0] == pytest.approx(1.0 + 6 * BAND.floor)


def test_changes_that_come_faster_than_the_warm_up_do_not_tie_a_layer_to_an_old_baseline():
    baseline = taught(noise(200))
    for step in range(300):
        if step % 10 == 0:
            baseline.begin_anew(wary=step % 20 == 0)
        baseline.accept(np.array([1.0]))
        baseline.end_record()
    assert baseline.center_L[0] == 1.0


def test_a_rebased_layer_is_watched_from_the_first_step():
    baseline = taught(noise(200, layers=2))
    old = baseline.center_L[1]
    baseline.rebase(np.array([True, False]), np.array([7.0, 7.0]))
    assert baseline.center_L.tolist() == [7.0, old]
    assert baseline.bound_L[0] == pytest.approx(7.0 + math.log(FAR))


@given(st.integers(1, 260), st.integers(0, 3))
def test_bounds_follow_from_the_arrays_alone(steps, seed):
    """A baseline that is given the arrays of another one has its bounds."""
    values = noise(steps, layers=4, seed=seed)
    one = taught(values)
    if steps % 2:
        one.begin_anew(wary=bool(steps % 4 == 1))
        one.accept(values[0])
    other = Baseline(4, BAND)
    for name, array in other.arrays().items():
        np.copyto(array, one.arrays()[name])
    other.restored()
    for bound in ("bound_L", "wary_bound_L", "calm_L"):
        assert getattr(other, bound).tolist() == getattr(one, bound).tolist()
