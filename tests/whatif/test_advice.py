"""Advice contains what explodes and spares what is healthy, on runs that it has not seen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import gradwatch
from gradwatch.policy import load_policy, parse_policy
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.whatif.advice import advise
from gradwatch.whatif.replay import replay

LAYOUT = Layout.of([Parameter(name="head.weight", shape=(2, 2))])
INFO = RunInfo(run="made", layout=LAYOUT)


def record(step: int, norm: float, **changed) -> StepRecord:
    values = {
        "step": step, "time": float(step), "layout": LAYOUT, "total_norm": norm,
        "total_norm_clipped": norm, "tensor_norms_P": np.array([norm], dtype=np.float32),
        "tensor_coefs_P": np.ones(1, dtype=np.float32), "present_P": np.ones(1, dtype=np.bool_),
    }  # fmt: skip
    return StepRecord(**(values | changed))


def made(norms, **changed) -> list[StepRecord]:
    return [record(step, float(norm), **changed) for step, norm in enumerate(norms)]


def log_normal(count: int = 1000, sigma: float = 0.15, seed: int = 0) -> np.ndarray:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(count))


def judged(records, info, advice):
    """Share of steps that the advice clips, and the largest norm that is left of a x100 spike."""
    policy = parse_policy("version: 1\n" + advice.policy)
    clipped = replay(records, info, policy).clipped / len(records)
    left = []
    for at in range(120, len(records), max(1, len(records) // 8)):
        spiked = list(records)
        spiked[at] = _times(records[at], 100.0)
        left.append(replay(spiked[: at + 1], info, policy).outcomes[at].total_norm_clipped)
    return clipped, max(left)


def _times(one: StepRecord, times: float) -> StepRecord:
    return replace(
        one,
        total_norm=one.total_norm * times,
        tensor_norms_P=one.tensor_norms_P * np.float32(times),
    )


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8])
def test_advice_of_one_run_holds_for_another(sigma):
    advice = advise(made(log_normal(sigma=sigma)), INFO)
    fresh = made(log_normal(sigma=sigma, seed=1))
    clipped, left = judged(fresh, INFO, advice)
    healthy = float(np.quantile([r.total_norm for r in fresh], 0.99))
    assert clipped < 0.01
    assert left < 3 * healthy
    assert advice.share_clipped < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "gpt"])
@pytest.mark.parametrize("seed", [101, 102])
def test_advice_of_a_demo_run_holds_for_a_fresh_seed(model, seed, tmp_path):
    from rich.console import Console

    from gradwatch.demo.outcome import once
    from gradwatch.demo.session import Options

    found = []
    for number in (seed, seed + 50):
        folder = tmp_path / str(number)
        options = Options(
            model=model, fault="none", policy=load_policy({"version": 1}), steps=400, seed=number,
            host="127.0.0.1", port=0, recording=folder, discovery=None, step_seconds=0.0,
            plain=True,
        )  # fmt: skip
        assert once(options, Console(quiet=True)) == 0
        with gradwatch.open_recording(folder) as recording:
            found.append((list(recording.records()), recording.info))
    (learnt, info), (fresh, _) = found
    for records in (learnt, fresh):
        clipped, left = judged(records, info, advise(learnt, info))
        healthy = float(np.quantile([r.total_norm for r in records], 0.99))
        print(f"{model}, seed {seed}: clips {clipped:.2%}, spike {left / healthy:.2f} of the p99")
        assert clipped < 0.01
        assert left < 3 * healthy


def test_spikes_and_faults_of_the_recorded_run_do_not_loosen_the_advice():
    norms = log_normal()
    norms[[300, 500, 700]] *= 1000
    norms[600:605] *= 50
    clean, broken = advise(made(log_normal()), INFO), advise(made(norms), INFO)
    assert broken.percentile == pytest.approx(clean.percentile, rel=0.05)


def exploded_at(step: int, count: int = 600) -> list[StepRecord]:
    """From there on a hundred times as large, and found three steps later."""
    norms = log_normal(count)
    norms[step:] *= 100.0
    records = made(norms)
    found = Anomaly(kind="exploding", level="alert", step=step + 3)
    records[step + 3] = replace(records[step + 3], anomalies=(found,))
    return records


def test_an_exploded_run_is_advised_by_the_steps_before_and_said_to_be_one():
    advice = advise(exploded_at(300), INFO)
    (warning,) = [point for point in advice.warnings if "not well" in point.what]
    assert warning.what == "this run was not well: exploding at step 303"
    assert "the 298 steps before it" in warning.why
    assert advice.percentile == pytest.approx(np.quantile(log_normal(600)[:298], 0.99))


def test_where_few_steps_are_before_the_alert_all_are_taken_and_that_is_said():
    advice = advise(exploded_at(50), INFO)
    (warning,) = [point for point in advice.warnings if "not well" in point.what]
    assert "all of its steps" in warning.why
    assert not [
        point for point in advise(made(log_normal()), INFO).warnings if "well" in point.what
    ]


def whats(points) -> list[str]:
    return [point.what.partition(":")[0] for point in points]


def test_a_saturated_limit_is_warned_of():
    info = replace(INFO, rules=("global",), multiplying=("global",))
    assert "saturated" in whats(advise(made(log_normal(), clipped=True), info).warnings)


def test_a_limit_that_never_clips_is_warned_of():
    info = replace(INFO, rules=("global",), multiplying=("global",))
    assert "never clips" in whats(advise(made(log_normal()), info).warnings)
    assert "never clips" not in whats(advise(made(log_normal()), INFO).warnings)


def test_a_limit_that_clips_from_the_alert_on_is_said_to_spare_the_steps_before_it():
    info = replace(INFO, rules=("global",), multiplying=("global",))
    records = exploded_at(300)
    records[301:341] = [replace(record, clipped=True) for record in records[301:341]]
    warnings = advise(records, info).warnings
    (warning,) = [point for point in warnings if point.what.startswith("clips no healthy step")]
    assert "none of the 298 steps before the alert was clipped, 40 later ones were" in warning.what
    assert "while the run was well" in warning.why
    assert "never clips" not in whats(warnings)


def test_saturation_is_said_to_be_of_the_steps_before_the_alert():
    info = replace(INFO, rules=("global",), multiplying=("global",))
    records = [replace(record, clipped=record.step < 298) for record in exploded_at(300)]
    whats_of = [point.what for point in advise(records, info).warnings]
    assert "saturated: 100% of the steps before the alert were clipped" in whats_of


def test_heavy_tails_are_warned_of_and_ordinary_ones_not():
    assert "heavy-tailed" in whats(advise(made(log_normal(sigma=0.5)), INFO).warnings)
    assert "heavy-tailed" not in whats(advise(made(log_normal(sigma=0.2)), INFO).warnings)


def test_a_new_level_is_warned_of_with_its_step():
    norms = log_normal()
    norms[500:] *= 5
    warnings = advise(made(norms), INFO).warnings
    assert "level shifts by more than 2 times near step 500" in [w.what for w in warnings]
    assert not advise(made(log_normal()), INFO).warnings


def test_steps_that_are_not_finite_are_counted_and_left_out():
    norms = log_normal()
    norms[[5, 200]] = math.nan, math.inf
    advice = advise(made(norms), INFO)
    assert "2 steps were not finite, first step 5" in [w.what for w in advice.warnings]
    assert math.isfinite(advice.percentile)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_few_steps_give_careful_advice_or_none(count):
    advice = advise(made(log_normal(count)), INFO)
    assert any("usable steps" in warning.what for warning in advice.warnings)
    assert (advice.policy == "") == (count == 0)
    if count:
        parse_policy("version: 1\n" + advice.policy)


@pytest.mark.parametrize(("unit", "steps"), [(1.0, 12), (4.0, 3)])
def test_micro_batches_are_advised_from_the_noise_scale(unit, steps):
    records = made(log_normal(), micro_batches=8, weight=8 * unit, noise_scale=12.2)
    point = advise(records, INFO).accumulation
    assert point.what == f"accumulate: {{steps: {steps}}} (now 8)"
    assert "1812.06162" in point.source


def test_without_a_noise_scale_it_is_said_how_to_have_one():
    point = advise(made(log_normal()), INFO).accumulation
    assert point.what == "accumulation: not known"
    assert "2 micro-batches or more" in point.why
