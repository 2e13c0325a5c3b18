"""What a finding leads to in a running loop."""

from __future__ import annotations

import logging
import time

import pytest
import torch

import gradwatch


def trained(task, watch, optimizer, steps, gain=1.0, start=0):
    for step in range(start, start + steps):
        watch.log(loss=task.gradient(step, gain))
        optimizer.step()
    watch.flush()


@pytest.fixture
def begun(task, attach):
    def begin(detect, **policy):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-4)
        return attach(task.model, optimizer, {"version": 1, "detect": detect, **policy}), optimizer

    return begin


def test_a_finding_may_stop_the_run_before_its_next_update(task, begun):
    watch, optimizer = begun({"exploding": {"then": "stop"}})
    assert watch.enforcing
    trained(task, watch, optimizer, 80)
    trained(task, watch, optimizer, 4, gain=1e3, start=80)
    before = task.parameters()
    task.gradient(84)
    said = r"detect\.exploding at step 82: exploding"
    with pytest.raises(gradwatch.TrainingStopped, match=said) as stop:
        optimizer.step()
    assert stop.value.reason == "exploding"
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


def test_in_shadow_it_is_said_and_the_run_goes_on(task, begun, caplog):
    watch, optimizer = begun({"exploding": {"then": "stop"}}, mode="shadow")
    trained(task, watch, optimizer, 80)
    trained(task, watch, optimizer, 10, gain=1e3, start=80)
    assert "the policy would stop the run here (exploding)" in caplog.text


@pytest.mark.parametrize(("then", "level"), [("record", "INFO"), ("warn", "WARNING")])
def test_a_finding_is_logged_where_it_is_to_warn(task, begun, caplog, then, level):
    watch, optimizer = begun({"exploding": {"then": then}, "spike": "none"})
    with caplog.at_level(logging.INFO, logger="gradwatch"):
        trained(task, watch, optimizer, 80)
        trained(task, watch, optimizer, 4, gain=1e3, start=80)
    said = [record.levelname for record in caplog.records if "exploding:" in record.message]
    assert said == [level]


def test_a_glob_that_matches_no_layer_is_refused_with_its_line(task, attach, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ndetect:\n  exploding: {layers: 'heads'}\n")
    with pytest.raises(gradwatch.PolicyError, match=r":3:15: detect\.exploding\.layers: no layer"):
        attach(task.model, torch.optim.SGD(task.model.parameters(), lr=0.1), path)


def test_a_run_that_makes_no_step_is_said_counted_and_recorded(task, attach, tmp_path, caplog):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-4)
    policy = {"version": 1, "detect": {"stuck": {"seconds": 0.3, "times": 1}}}
    watch = attach(task.model, optimizer, policy, recording=tmp_path)
    trained(task, watch, optimizer, 3)
    told = []
    watch.on_anomaly(told.append)
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [anomaly.kind for anomaly in told] == ["stuck"]
    assert "since step 2, where one takes" in caplog.text
    events = watch.pipeline.tally.snapshot().labelled["events_total"]
    assert events["stuck", "warning"] == 1
    watch.close()
    with gradwatch.open_recording(tmp_path) as recording:
        assert [anomaly.kind for anomaly in recording.anomalies()] == ["stuck"]


def test_a_run_is_healthy_since_the_last_alert(task, begun):
    watch, optimizer = begun({})
    trained(task, watch, optimizer, 80)
    assert watch.healthy_since == 0
    trained(task, watch, optimizer, 4, gain=1e3, start=80)
    assert watch.healthy_since is None
    state = watch.state_dict()
    trained(task, watch, optimizer, 20, start=84)
    healthy_since = watch.healthy_since
    assert 84 < healthy_since <= 95
    records = watch.history(40)
    assert [r.step for r in records if r.anomalies and r.step >= healthy_since] == []
    watch.load_state_dict(state)
    assert watch.healthy_since is None


def test_a_step_that_is_not_finite_makes_a_run_unhealthy_at_once(task, begun):
    watch, optimizer = begun({}, guard={"nonfinite": "skip"})
    trained(task, watch, optimizer, 5)
    trained(task, watch, optimizer, 1, gain=float("nan"), start=5)
    assert watch.healthy_since is None
    trained(task, watch, optimizer, 10, start=6)
    assert watch.healthy_since == 10


def test_an_event_leaves_a_run_healthy(task, begun):
    watch, optimizer = begun({})
    trained(task, watch, optimizer, 80)
    trained(task, watch, optimizer, 1, gain=1e3, start=80)
    trained(task, watch, optimizer, 5, start=81)
    assert "spike" in {a.kind for r in watch.history(10) for a in r.anomalies}
    assert watch.healthy_since == 0


def test_a_clip_that_was_left_in_the_loop_is_noticed(task, begun):
    watch, optimizer = begun({}, clip=[{"limit": 1.0}])
    for step in range(12):
        task.gradient(step, 1e3)
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
    watch.flush()
    (found,) = (anomaly for record in watch.history(12) for anomaly in record.anomalies)
    assert (found.kind, found.level, found.step) == ("clipped_elsewhere", "warning", 4)


def test_a_clip_of_gradients_that_are_still_scaled_is_told_by_what_it_clips_to(task, attach):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    watch = attach(task.model, optimizer, scaler=scaler)
    for step in range(12):
        task.gradient(step, 2.0**16)
        scaler.scale(torch.zeros(()))
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    watch.flush()
    (found,) = (anomaly for record in watch.history(12) for anomaly in record.anomalies)
    assert "the total norm is 1.52588e-05 (1 before scaler.unscale_)" in found.message
