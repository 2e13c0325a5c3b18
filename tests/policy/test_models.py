"""What a policy means: its defaults, its canonical form, whether it enforces anything."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
import yaml
from pydantic import ValidationError

from gradwatch.policy import (
    Budget,
    ClipRule,
    Depth,
    Guard,
    Policy,
    Schedule,
    StatisticLimit,
    load_policy,
    parse_policy,
)


def policy(**sections) -> Policy:
    return load_policy({"version": 1, **sections})


def test_a_full_policy_is_decoded_key_by_key(full_text):
    decoded = parse_policy(full_text)
    assert (decoded.version, decoded.mode, decoded.layers) == (1, "shadow", Depth(depth=2))
    assert decoded.grouping == 2
    assert decoded.guard == Guard(
        nonfinite="stop", patience=10, budget=Budget(skips=50, steps=1000), on_error="stop"
    )
    assert decoded.clip[0] == ClipRule(
        params=("blocks.*", "head"),
        exclude="*.bias",
        types=("Linear", "Embedding"),
        groups=(0, 1),
        ndim=">=2",
        per="group",
        limit=Schedule(((0, 10.0), (2000, 0.1))),
        then="skip",
        name="too tall",
        eps=1e-7,
    )
    exploding, vanishing = decoded.detect.exploding, decoded.detect.vanishing
    assert exploding is not None
    assert (exploding.z, exploding.times, exploding.need, exploding.of) == (5.0, 3.5, 2, 4)
    assert (exploding.floor, exploding.warmup, exploding.window) == (0.1, 40, 64)
    assert decoded.detect.spike is None
    assert vanishing is not None
    assert (vanishing.share, vanishing.need, vanishing.of, vanishing.after) == (1e-6, 3, 4, 100)


def test_the_detectors_are_on_with_their_published_defaults():
    detect = policy().detect
    for outlier, need, of in ((detect.exploding, 3, 5), (detect.spike, 1, 1)):
        assert (outlier.z, outlier.times, outlier.floor) == (6.0, 4.0, 0.25)
        assert (outlier.need, outlier.of) == (need, of)
        assert (outlier.warmup, outlier.window) == (50, 128)
    vanishing = detect.vanishing
    assert (vanishing.share, vanishing.need, vanishing.of, vanishing.after) == (1e-5, 20, 25, 20)
    assert (detect.nonfinite.then, detect.spike.then) == ("warn", "record")


def test_no_policy_only_observes():
    observing = load_policy(None)
    assert (observing.mode, observing.effective_mode) == ("observe", "observe")
    assert not observing.enforcing
    assert load_policy(observing) is observing
    assert (observing.clip, observing.guard.nonfinite) == ((), "none")
    assert (observing.canonical_yaml(), observing.sha256) == ("", "")


@pytest.mark.parametrize(
    ("sections", "nonfinite", "on_error"),
    [
        ({}, "skip", "stop"),
        ({"guard": {"patience": 3}}, "skip", "stop"),
        ({"guard": {"nonfinite": "none", "on_error": "observe"}}, "none", "observe"),
        ({"mode": "shadow"}, "skip", "observe"),
        ({"mode": "shadow", "guard": {"patience": 3}}, "skip", "observe"),
        ({"mode": "shadow", "guard": {"on_error": "stop"}}, "skip", "stop"),
    ],
)
def test_what_the_guard_leaves_out_depends_on_the_mode(sections, nonfinite, on_error):
    guard = policy(**sections).guard
    assert (guard.nonfinite, guard.on_error) == (nonfinite, on_error)


@pytest.mark.parametrize(
    ("sections", "enforcing", "mode"),
    [
        ({}, True, "enforce"),
        ({"guard": {"nonfinite": "none"}}, False, "observe"),
        ({"guard": {"nonfinite": "none"}, "clip": [{"limit": 1}]}, True, "enforce"),
        (
            {"guard": {"nonfinite": "none"}, "clip": [{"limit": 1, "then": "warn"}]},
            False,
            "observe",
        ),
        ({"mode": "shadow", "clip": [{"limit": 1}]}, False, "shadow"),
    ],
)
def test_a_policy_enforces_where_it_has_something_to_enforce(sections, enforcing, mode):
    assert policy(**sections).enforcing is enforcing
    assert policy(**sections).effective_mode == mode


@pytest.mark.parametrize(
    ("rule", "eps"),
    [
        ({"limit": 1}, 1e-6),
        ({"limit": {0: 2, 10: 1}}, 1e-6),
        ({"limit": 1, "params": "head.*"}, 1e-6),
        ({"limit": 1, "per": "tensor"}, 0.0),
        ({"limit": 1, "then": "skip"}, 0.0),
        ({"limit": 1, "eps": 0}, 0.0),
        ({"limit": 1, "eps": "1e-8"}, 1e-8),
    ],
)
def test_eps_is_that_of_torch_only_where_the_rule_is_that_of_torch(rule, eps):
    assert policy(clip=[rule]).clip[0].eps == eps


def test_rules_without_a_name_get_one_that_nobody_has():
    rules = [
        {"limit": 1},
        {"limit": 1, "per": "layer"},
        {"limit": 1, "name": "global-2"},
        {"limit": 1},
        {"limit": 1, "per": "layer"},
    ]
    names = [rule.name for rule in policy(clip=rules).clip]
    assert names == ["global", "per-layer", "global-2", "global-3", "per-layer-2"]


def test_a_default_name_makes_way_for_the_same_name_given_later():
    names = [rule.name for rule in policy(clip=[{"limit": 1}, {"limit": 2, "name": "global"}]).clip]
    assert names == ["global-2", "global"]


def test_the_canonical_form_leaves_out_what_goes_without_saying(full_text):
    written = {
        "mode": "enforce",
        "layers": "module",
        "guard": {"nonfinite": "skip", "on_error": "stop"},
        "clip": [{"params": ["*"], "limit": 1, "eps": 1e-6, "name": "global", "then": "scale"}],
        "detect": {"spike": {"need": 1}},
    }
    assert policy(**written).canonical_yaml() == "version: 1\nclip:\n- limit: 1.0\n"
    assert policy(**written).sha256 == policy(clip=[{"limit": 1.0}]).sha256
    assert policy(**written) == policy(clip=[{"limit": 1.0}])


def test_the_hash_is_that_of_the_canonical_form_and_tells_policies_apart(full_text):
    full = parse_policy(full_text)
    assert full.sha256 == hashlib.sha256(full.canonical_yaml().encode()).hexdigest()
    assert full.sha256 != parse_policy(full_text.replace("0.5", "0.6")).sha256


def test_a_plain_safe_load_of_the_file_means_the_same(full_text):
    assert load_policy(yaml.safe_load(full_text)) == parse_policy(full_text)


def test_equal_policies_from_different_places_are_equal(full_text):
    here, there = parse_policy(full_text, "a.yaml"), parse_policy("\n" + full_text, "b.yaml")
    assert here == there
    assert hash(here) == hash(there)
    assert (here.source, there.source) == ("a.yaml", "b.yaml")


def test_a_policy_is_frozen_and_travels(full_text):
    full = parse_policy(full_text, "a.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        full.mode = "enforce"
    for other in (pickle.loads(pickle.dumps(full)), copy.deepcopy(full)):
        assert other == full
        assert other.source == "a.yaml"


def test_a_policy_put_together_in_python_is_returned_as_it_is():
    made = Policy(version=1, clip=(ClipRule(limit=1.0), ClipRule(limit=Schedule(((0, 2.0),)))))
    assert load_policy(made) is made
    assert [rule.name for rule in made.clip] == ["global", "global-2"]


def test_a_rule_put_together_in_python_is_checked_like_any_other():
    with pytest.raises(ValidationError, match="must be finite"):
        ClipRule(limit=10**400)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({}, "exactly one of z, ratio and quantile"),
        ({"z": 4, "ratio": 2}, "exactly one of z, ratio and quantile"),
        ({"z": 4, "decay": 0.9, "window": 9}, "a decay or a window, not both"),
        ({"z": 4, "min": 2, "max": 1}, "min <= max"),
        ({"quantile": 1.5}, "less than 1"),
    ],
)
def test_a_statistic_limit_knows_what_does_not_go_together(keys, complaint):
    with pytest.raises(ValidationError, match=complaint):
        StatisticLimit(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"z": 2.5, "space": "raw", "decay": 0.97, "warmup": 25, "learn": "clipped"},
        {"quantile": 0.1, "window": "all", "learn": "raw"},
        {"ratio": 1.04, "decay": 0.99, "warmup": 100, "until": 1.0, "to": "reciprocal"},
    ],
)
def test_published_statistic_limits_can_be_written(keys):
    limit = StatisticLimit(**keys)
    assert limit.written() == {key: keys[key] for key in limit.written()}
    assert StatisticLimit(**limit.written()) == limit


@pytest.mark.parametrize(
    ("steps", "written"),
    [(8, 8), ({0: 1, 1000: 4}, {0: 1, 1000: 4}), ({"target": 4096}, {"target": 4096})],
)
def test_accumulation_knows_its_three_forms_of_steps(steps, written):
    made = Policy(version=1, accumulate={"steps": steps, "weigh": "sum"})
    assert made.written()["accumulate"] == {"steps": written, "weigh": "sum"}
