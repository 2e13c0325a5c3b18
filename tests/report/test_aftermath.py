"""What is read out of the steps since an alert, on runs whose course is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.recording.cards import card_of
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.report.aftermath import MOST, Course

LAYOUT = Layout.of([
    Parameter(name="a.weight", module="Linear"), Parameter(name="b.weight", module="BatchNorm2d"),
])  # fmt: skip
FIRST = 200


def record(step: int, a: float = 3.0, b: float = 4.0, loss: float = 1.0, rate: float = 0.1):
    total = math.hypot(a, b)
    clipped = min(total, 10.0)
    return StepRecord(
        step=step, time=float(step), layout=LAYOUT, total_norm=total, total_norm_clipped=clipped,
        clipped=clipped < total, fired=("global",) if clipped < total else (),
        tensor_norms_P=np.array([a, b], np.float32), tensor_coefs_P=np.ones(2, np.float32),
        present_P=np.ones(2, bool), scalars={"loss": loss}, learning_rate=rate,
    )  # fmt: skip


def after(records: dict[int, StepRecord], steps: int = 60, found: int = 202):
    """Of a run that is as before but for some records."""
    every = [records.get(step, record(step)) for step in range(FIRST + steps)]
    message = f"exploding: layer a and 1 more: it is much since step {FIRST}"
    anomaly = Anomaly(kind="exploding", level="alert", step=found, layer="a", message=message)
    info = RunInfo(run="x", layout=LAYOUT, mode="enforce")
    course = Course(card_of(info, anomaly, every[: found + 1]), LAYOUT, every[72:FIRST])
    for one in every[FIRST : FIRST + MOST]:
        course.take(one)
    return course.so_far(every[-50:])


def test_the_largest_of_each_number_has_its_step_wherever_the_alert_was():
    told = after({
        200: record(200, 30.0, 40.0, 5.0), 204: record(204, 300.0, 8.0, 7.0),
        210: record(210, 3.0, 80.0, 9.0),
    })  # fmt: skip
    assert (told.layer.layer, told.layer.step, told.layer.value) == ("a", 204, pytest.approx(100))
    assert (told.norm.step, told.loss.step, told.loss.value) == (204, 210, 9.0)
    step, before, clipped = told.hardest
    assert (step, before, clipped) == (204, pytest.approx(300.1, abs=0.1), 10.0)
    assert (told.num_clipped, told.num_steps, told.fired) == (3, 60, ("global",))


def test_good_begins_behind_the_last_step_that_was_far_off():
    assert after({200: record(200, 30.0, 40.0), 230: record(230, 30.0, 40.0)}).good_since == 231
    assert after({259: record(259, 30.0, 40.0)}).good_since is None


def test_what_is_not_finite_is_counted_and_is_no_maximum():
    told = after({200: record(200, math.nan, 1.0, math.nan), 201: record(201, loss=2.0)})
    assert (told.num_nonfinite, told.good_since) == (1, 201)
    assert (told.loss.step, told.norm.value) == (201, 5.0)


def test_a_learning_rate_that_went_back_is_told_with_its_step():
    raised = {step: record(step, rate=5.0) for step in (199, 200, 201)}
    told = after(raised)
    assert told.rate_back == (202, 0.1)
    assert told.rise_taken
    kept = {step: record(step, rate=5.0) for step in range(199, 260)}
    assert after(kept).rate_back is None


def test_layers_at_the_end_are_medians_over_medians():
    records = {step: record(step, a=9.0) for step in range(240, 260)}
    told = after({**records, 250: record(250, a=900.0)})
    assert told.layers_now == {"a": pytest.approx(3.0), "b": pytest.approx(1.0)}
    assert told.still_up == ["a"]


def test_a_few_steps_later_nothing_is_said_of_the_end():
    told = after({}, steps=5)
    assert (told.layers_now, told.num_recent) == ({}, 2)
    assert math.isnan(told.loss_now)


def test_of_a_long_run_the_steps_that_were_not_looked_at_are_not_told_of():
    told = after({200: record(200, 30.0, 40.0)}, steps=MOST + 100)
    assert (told.until, told.step, told.num_steps) == (199 + MOST, 299 + MOST, MOST)
    assert told.good_since is None


def test_layers_that_a_forward_pass_changes_statistics_of_are_known():
    assert after({}).batch_norms == ("b",)


def test_of_a_run_that_stays_nonfinite_no_layer_is_told_of_at_its_end():
    nan = math.nan
    told = after({step: record(step, nan, nan, nan) for step in range(200, 260)})
    assert (told.layers_now, told.still_up) == ({}, [])
    assert told.num_nonfinite == 60
