"""A recording is judged again by the policy that ran, and by others."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import load_policy
from gradwatch.whatif.replay import replay
from tests.whatif.conftest import STEPS, rough

STATISTIC = {"z": 4, "warmup": 20}
CHAINS = {
    "a number": [{"limit": 0.5}],
    "a schedule": [{"limit": {0: 2.0, 150: 0.1}}],
    "learning": [{"limit": STATISTIC}],
    "a chain": [
        {"per": "tensor", "limit": {"ratio": 1.5, "warmup": 10}},
        {"per": "layer", "limit": 0.3, "measure": "l1"},
        {"limit": {"z": 3, "space": "raw", "warmup": 5, "to": "reciprocal"}, "name": "whole"},
    ],
    "skips": [
        {"limit": 1.0},
        {"limit": {"z": 6, "warmup": 30}, "then": "skip", "name": "spike"},
        {"measure": "loss", "limit": {"z": 6, "warmup": 30}, "then": "skip", "name": "loss"},
    ],
    "weights and updates": [
        {"per": "tensor", "measure": "weight", "limit": 0.05, "floor": 0.1},
        {"measure": "update", "limit": 1.5, "then": "warn", "name": "update"},
    ],
    "units": [{"per": "unit", "limit": 0.1}, {"limit": 0.5}],
    "relative units": [{"per": "unit", "measure": "weight", "limit": 0.05}],
    "elements": [{"per": "element", "limit": 0.05}],
    "zeroing": [{"per": "tensor", "limit": 0.5, "then": "zero"}, {"measure": "rms", "limit": 0.02}],
}


def policy(clip, **sections):
    return {"version": 1, **sections, "clip": clip}


@pytest.mark.parametrize("name", CHAINS)
def test_the_policy_that_ran_is_decided_again_as_it_was(recorded, name):
    given = policy(CHAINS[name], guard={"nonfinite": "skip", "patience": 5})
    recording = recorded(given, gains=rough)
    records = list(recording.records())
    assert any(record.fired for record in records), "a test that cannot fail"
    found = replay(records, recording.info, load_policy(given))
    assert found.is_the_one_that_ran
    assert found.unknown == {}
    assert found.notes == []
    if name not in ("units", "elements"):  # what follows a rule on data is known by its record only
        assert [d for d in found.differences if not d.is_near] == []
    assert [o.skipped for o in found.outcomes] == [r.skipped for r in records]
    assert found.skipped["nonfinite"] == 1
    for outcome, record in zip(found.outcomes, records, strict=True):
        assert outcome.total_norm_clipped == pytest.approx(
            record.total_norm_clipped, rel=1e-6, nan_ok=True
        )
    assert found.clipped == sum(record.clipped for record in records)


@pytest.mark.parametrize("name", ["a number", "learning", "a chain", "skips", "zeroing"])
def test_what_shadow_mode_said_is_what_another_recording_replays(recorded, name):
    """A run that only observed, judged by a policy, against a shadow run of that policy."""
    clip = [rule for rule in CHAINS[name] if rule.get("measure") not in ("l1",)]
    given = policy(clip, mode="shadow")
    shadow, observed = recorded(given, gains=rough), recorded(None, gains=rough)
    found = replay(observed.records(), observed.info, load_policy(given))
    assert not found.is_the_one_that_ran
    for outcome, record in zip(found.outcomes, shadow.records(), strict=True):
        assert outcome.fired == record.fired
        assert outcome.skipped == record.skipped
        assert outcome.clipped == record.clipped
        assert outcome.limits == pytest.approx(record.limits, rel=1e-6)
        assert outcome.total_norm_clipped == pytest.approx(
            record.total_norm_clipped, rel=1e-6, nan_ok=True
        )


def test_a_rule_that_needs_what_was_not_recorded_says_so_and_the_others_are_answered(recorded):
    recording = recorded(None)
    clip = [
        {"limit": 0.2},
        {"measure": "l1", "limit": 1, "name": "one"},
        {"measure": "weight", "per": "tensor", "limit": 1, "name": "relative"},
        {"per": "element", "limit": 1, "name": "value"},
        {"per": "unit", "limit": 1, "name": "rows"},
    ]
    found = replay(recording.records(), recording.info, load_policy(policy(clip)))
    assert found.unknown == {
        "one": "not recorded: l1",
        "relative": "not recorded: weight",
        "value": "not recorded: linf",
        "rows": "not recorded: l2 of each unit",
    }
    assert found.fired["global"] > 0


def test_what_was_recorded_decides_and_what_differs_is_listed(recorded):
    given = policy([{"limit": 0.5}])
    recording = recorded(given)
    records = list(recording.records())
    step = next(r.step for r in records if r.total_norm < 0.4)
    records[step] = replace(records[step], fired=("global",), clipped=True)
    found = replay(records, recording.info, load_policy(given))
    (difference,) = found.differences
    assert (difference.step, difference.rule, difference.recorded) == (step, "global", True)
    assert not difference.is_near
    assert found.outcomes[step].clipped


def test_a_decision_within_float32_of_its_limit_is_told_apart(recorded):
    recording = recorded(None)
    record = next(iter(recording.records()))
    limit = record.total_norm * (1 + 3e-7)
    given = load_policy(policy([{"limit": limit}]))
    info = replace(recording.info, policy=given.canonical_yaml(), policy_sha256=given.sha256,
                   rules=("global",))  # fmt: skip
    changed = replace(record, fired=("global",), clipped=True, limits={"global": limit})
    found = replay([changed], info, given)
    assert [difference.is_near for difference in found.differences] == [True]


def test_a_policy_that_would_have_stopped_the_run_says_where(recorded):
    recording = recorded(None, gains=rough)
    given = policy([{"limit": 1e-9, "then": "stop", "name": "tiny"}], guard={"nonfinite": "none"})
    found = replay(recording.records(), recording.info, load_policy(given))
    assert found.stop.step == 0
    assert "tiny" in found.stop.stop
    assert len(found.outcomes) == STEPS


def test_detectors_of_the_policy_are_run_again(recorded):
    recording = recorded(None, gains=lambda step: 1000.0 if 100 <= step < 110 else 1.0)
    given = policy([], detect={"exploding": "none"})
    told = replay(recording.records(), recording.info, load_policy(policy([])))
    quiet = replay(recording.records(), recording.info, load_policy(given))
    assert "exploding" in {anomaly.kind for anomaly in told.anomalies}
    assert [(a.kind, a.step) for a in told.anomalies] == [
        (a.kind, a.step) for a in recording.anomalies()
    ]
    assert "exploding" not in {anomaly.kind for anomaly in quiet.anomalies}


def test_selectors_that_match_nothing_in_the_recorded_model_are_an_error(recorded):
    recording = recorded(None, steps=3)
    with pytest.raises(PolicyError, match="no parameter matches head"):
        replay(
            recording.records(),
            recording.info,
            load_policy(policy([{"params": "head*", "limit": 1}])),
        )


def test_a_recording_that_begins_late_says_that_histories_do(recorded):
    recording = recorded(policy(CHAINS["learning"]))
    late = list(recording.records(100))
    found = replay(late, recording.info, load_policy(policy(CHAINS["learning"])))
    assert found.notes == ["the recording begins at step 100: histories begin anew there"]


def test_an_empty_recording_replays_to_nothing(recorded):
    recording = recorded(policy(CHAINS["a number"]), steps=0)
    found = replay(recording.records(), recording.info, load_policy(policy(CHAINS["a number"])))
    assert (found.outcomes, found.clipped, found.stop) == ([], 0, None)


def test_norms_of_steps_are_those_of_the_recording(recorded):
    recording = recorded(None)
    _, norms = recording.series("total_norm")
    found = replay(recording.records(), recording.info, load_policy(policy([{"limit": 0.2}])))
    np.testing.assert_allclose([o.total_norm for o in found.outcomes], norms, rtol=1e-7)
    after = [o.total_norm_clipped for o in found.outcomes]
    assert max(after) <= 0.2 * (1 + 1e-6)
    assert not any(math.isnan(norm) for norm in after)
