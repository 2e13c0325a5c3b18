"""What must not change a finding: scale, order, a NaN elsewhere, a restart, a replay."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradwatch.policy import Detect
from gradwatch.records import Layout, Parameter
from gradwatch.rules.detection import Detection

STEPS, LAYERS = 500, 6
NAMES = [f"block.{i}" for i in range(LAYERS)]


def eventful(seed: int = 0) -> np.ndarray:
    """[T, L] a run with a burst, spikes, an explosion of two layers and one that vanishes."""
    draw = np.random.default_rng(seed)
    level = np.array([1.0, 0.3, 2.0, 0.7, 5.0, 0.1])
    norms = level * np.exp(0.3 * draw.standard_normal((STEPS, LAYERS)))
    norms[20:26, 4] *= 3000.0
    norms[150, 2] *= 40.0
    norms[220:260, 0] *= 60.0
    norms[222:260, 1] *= 90.0
    norms[320:390, 3] *= 1e-8
    norms[450, 5] *= 40.0
    return norms


EXPECTED = {
    ("spike", "event", 20),
    ("exploding", "alert", 22),
    ("spike", "event", 150),
    ("spike", "event", 220),
    ("exploding", "alert", 222),
    ("vanishing", "alert", 339),
    ("collapsed", "alert", 339),
    ("spike", "event", 450),
}


def findings(anomalies):
    return [(a.kind, a.level, a.step, a.layer, a.layers) for a in anomalies]


def test_the_eventful_run_holds_what_the_other_tests_rely_on(run, layers_named):
    anomalies = run(layers_named(NAMES)).play(eventful())
    assert {(a.kind, a.level, a.step) for a in anomalies} == EXPECTED
    assert len(anomalies) == len(EXPECTED)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1024.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_scaling_every_gradient_changes_nothing(run, layers_named, factor, seed):
    plain = run(layers_named(NAMES)).play(eventful(seed))
    scaled = run(layers_named(NAMES)).play(factor * eventful(seed))
    assert findings(scaled) == findings(plain)


@given(st.permutations(range(LAYERS)))
@settings(max_examples=10)
def test_the_order_of_layers_changes_nothing(run, layers_named, order):
    plain = run(layers_named(NAMES)).play(eventful())
    permuted = run(layers_named(NAMES[i] for i in order)).play(eventful()[:, order])
    assert permuted == plain


@given(st.integers(0, STEPS - 1), st.sampled_from(["nan", "inf"]), st.booleans())
@example(149, "nan", False)
@example(221, "inf", True)
@example(220, "nan", False)
@settings(max_examples=15)
def test_an_inserted_nonfinite_step_hides_nothing(run, layers_named, at, bad, everywhere):
    a_run = run(layers_named(NAMES))
    broken = np.full((1, LAYERS), float(bad)) if everywhere else eventful()[at : at + 1].copy()
    broken[0, 3] = float(bad)
    before, after = np.split(eventful(), [at])
    anomalies = a_run.play(before) + a_run.play(broken, skipped="nonfinite") + a_run.play(after)
    found = {(a.kind, a.level, a.step - (a.step > at)) for a in anomalies}
    assert ("nonfinite", "alert", at) in found
    # Inserted into an explosion, the other layers are one abnormal step ahead.
    ahead = 0 if everywhere else 1
    rest = sorted(found - {("nonfinite", "alert", at)})
    for (kind, level, step), expected in zip(rest, sorted(EXPECTED), strict=True):
        assert (kind, level) == expected[:2]
        assert expected[2] - ahead <= step <= expected[2]


def through_files(state, path):
    """Arrays as npz without pickle, the rest as JSON."""
    arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
    np.savez(path, **arrays)
    rest = json.loads(json.dumps({k: v for k, v in state.items() if k not in arrays}))
    with np.load(path, allow_pickle=False) as saved:
        return rest | {name: saved[name] for name in saved.files}


@given(st.integers(0, STEPS))
@example(24)
@example(221)
@example(340)
@settings(max_examples=15)
def test_a_saved_and_loaded_detection_goes_on_as_if_nothing_had_been(
    run, layers_named, tmp_path_factory, at
):
    def rate(step):
        return 1e-3 if step < 180 else 1e-4

    def micro_batches(step):
        return 4 if step < 400 else 16

    schedule = {"learning_rate": rate, "micro_batches": micro_batches}
    whole = run(layers_named(NAMES))
    uninterrupted = whole.play(eventful(), **schedule)

    first, second = run(layers_named(NAMES)), run(layers_named(NAMES))
    anomalies = first.play(eventful()[:at], **schedule)
    path = tmp_path_factory.mktemp("state") / "state.npz"
    second.detection.load_state_dict(through_files(first.detection.state_dict(), path))
    second.step = at
    assert second.detection.active() == first.detection.active()
    anomalies += second.play(eventful()[at:], **schedule)

    assert anomalies == uninterrupted
    ours, theirs = second.detection.state_dict(), whole.detection.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_state_dict_does_not_change_when_the_run_goes_on(run, layers_named):
    a_run = run(layers_named(NAMES))
    a_run.play(eventful()[:200])
    state = a_run.detection.state_dict()
    kept = {k: v.copy() for k, v in state.items() if isinstance(v, np.ndarray)}
    a_run.play(eventful()[200:])
    for name, value in kept.items():
        np.testing.assert_array_equal(state[name], value)


def test_a_replay_of_the_records_gives_the_anomalies_of_the_live_run(run, layers_named):
    a_run = run(layers_named(NAMES))
    live = a_run.play(eventful())
    again = Detection(layers_named(NAMES))
    assert [a for record in a_run.seen for a in again.observe(record)] == live


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(run, layers_named):
    a_run = run(layers_named(NAMES))
    a_run.play(eventful()[:240])
    state, active = a_run.detection.state_dict(), a_run.detection.active()
    others = Detection(layers_named(NAMES[::-1])).state_dict()
    fewer = Detection(layers_named(NAMES), Detect(vanishing=None)).state_dict()
    short = {**state, "vanishing.open": np.zeros(2, dtype=bool)}
    for wrong, message in (
        ({}, "must be of version 1. Received: None"),
        ({**state, "version": 99}, "Received: 99"),
        (others, "6 layers, which are not the 6 watched ones"),
        (fewer, "vanishing.open must be bool .*Received: nothing"),
        (short, r"Received: bool \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            a_run.detection.load_state_dict(wrong)
    assert a_run.detection.active() == active
    a_run.detection.load_state_dict(state)


def test_grouping_parameters_by_module_adds_their_squares(run):
    """Two tensors of a module that move apart: what counts is the norm of both."""
    layout = Layout.of([Parameter(name="a.weight"), Parameter(name="a.bias")])
    a_run = run(layout)
    norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((160, 2)))
    assert a_run.play(norms) == []
    (spike,) = a_run.play(np.array([[9.0, 40.0]]))
    assert spike.value == pytest.approx(41.0)
