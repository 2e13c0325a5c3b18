"""What is read out of a recording, on runs whose course is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.demo.findings import find
from gradwatch.records import Anomaly, Layout, Parameter, StepRecord

LAYOUT = Layout.of([Parameter(name="a.weight"), Parameter(name="b.weight")])
LIMIT = 2.0


def record(step: int, a: float, b: float, loss: float = 1.0) -> StepRecord:
    total = math.hypot(a, b)
    coef = min(1.0, LIMIT / total) if math.isfinite(total) else 1.0
    skipped = None if math.isfinite(total) else "nonfinite"
    return StepRecord(
        step=step,
        time=float(step),
        layout=LAYOUT,
        total_norm=total,
        total_norm_clipped=total * coef,
        clip_coef=coef,
        clipped=coef < 1,
        skipped=skipped,
        tensor_norms_P=np.array([a, b], np.float32),
        tensor_coefs_P=np.full(2, coef, np.float32),
        present_P=np.ones(2, bool),
        scalars={"loss": loss},
    )


def run(num_steps: int = 200, **changed: tuple[float, float]) -> list[StepRecord]:
    """Norms 1 and 0.5, but for the steps given as `step_120=(a, b)`."""
    norms = {int(name.removeprefix("step_")): pair for name, pair in changed.items()}
    return [record(step, *norms.get(step, (1.0, 0.5))) for step in range(num_steps)]


def alert(step: int, kind: str = "exploding") -> Anomaly:
    return Anomaly(kind=kind, level="alert", step=step, layer="b", layers=("b",), message="b grew")


def test_the_layer_that_left_its_usual_norm_first_comes_first():
    records = run(step_150=(1.0, 5.0), step_151=(8.0, 50.0), step_152=(9.0, 40.0))
    moved = find(records, [alert(152)]).movers
    assert [(mover.layer, mover.step) for mover in moved] == [("b", 150), ("a", 151)]
    assert [mover.usual for mover in moved] == [0.5, 1.0]
    assert [mover.worst for mover in moved] == [50.0, 9.0]


def test_a_layer_within_four_times_its_usual_norm_has_not_moved():
    records = run(step_150=(3.9, 50.0))
    assert [mover.layer for mover in find(records, [alert(150)]).movers] == ["b"]


def test_what_was_usual_is_not_taken_from_the_explosion_or_from_a_step_without_a_norm():
    records = run(step_149=(9.0, 90.0), step_150=(9.0, 90.0), step_120=(math.nan, math.nan))
    findings = find(records, [alert(150)])
    assert {mover.layer: mover.usual for mover in findings.movers} == {"a": 1.0, "b": 0.5}
    assert findings.usual_total_norm == pytest.approx(math.hypot(1.0, 0.5))


def test_clipped_steps_are_those_of_the_records_and_the_hardest_is_named():
    findings = find(run(step_3=(4.0, 0.0), step_9=(40.0, 0.0)), [])
    assert findings.clipped == (3, 9)
    assert findings.hardest is not None
    assert findings.hardest.step == 9
    assert not findings.alerts


def test_skipped_steps_are_counted_by_reason():
    assert find(run(step_9=(math.nan, 1.0)), []).skipped == {"nonfinite": 1}


def test_calm_begins_after_the_last_step_far_from_usual():
    records = run(step_150=(50.0, 1.0), step_160=(50.0, 1.0))
    assert find(records, [alert(150)]).calm_since == 161


def test_a_run_that_ends_in_the_explosion_never_calmed():
    assert find(run(step_199=(50.0, 1.0)), [alert(199)]).calm_since is None


def test_the_loss_is_told_before_at_worst_and_at_the_end():
    records = run()
    course = [*(1.0 for _ in range(150)), *(9.0 for _ in range(30)), *(3.0 for _ in range(20))]
    records = [record(r.step, 1.0, 0.5, loss=course[r.step]) for r in records]
    loss = find(records, [alert(150)]).loss
    assert loss is not None
    assert (loss.before, loss.worst, loss.end) == pytest.approx((1.0, 9.0, 3.0))
    assert loss.made_good == pytest.approx(0.5)  # 9 to 3 is half the way to 1


def test_an_alert_too_near_the_end_leaves_the_loss_untold():
    assert find(run(), [alert(195)]).loss is None


def test_a_loss_that_is_not_finite_does_not_spoil_the_story():
    records = [*run(150), *(record(150 + i, 1.0, 0.5, math.nan) for i in range(2))]
    records += [record(152 + i, 1.0, 0.5) for i in range(48)]
    loss = find(records, [alert(150, "nonfinite")]).loss
    assert loss is not None
    assert loss.end == pytest.approx(1.0)


def test_one_step_events_are_no_alerts():
    spike = Anomaly(kind="spike", level="event", step=70, message="one step")
    findings = find(run(), [spike])
    assert findings.events == (spike,)
    assert findings.alerts == ()


def test_an_alert_in_the_first_step_has_nothing_to_compare_with():
    findings = find(run(step_0=(50.0, 50.0)), [alert(0)])
    assert findings.movers == ()
    assert findings.loss is None
