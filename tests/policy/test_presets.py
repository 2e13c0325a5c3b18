"""`use: NAME` is a shorter way to write plain keys, and nothing more."""

from __future__ import annotations

import pytest
import yaml

from gradwatch.errors import PolicyError
from gradwatch.policy import check_against, load_policy, parse_policy
from gradwatch.policy.presets import PRESETS
from gradwatch.records import Layout, Parameter

LAYOUT = Layout.of([Parameter(name="a.weight", shape=(2, 2), module="Linear")])


def clip(*items):
    """The rules as plain data, defaults left out."""
    return yaml.safe_load(load_policy({"version": 1, "clip": list(items)}).canonical_yaml())["clip"]


def complaints(text):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "policy.yaml")
    return str(caught.value).splitlines()


PLAIN = {
    "agc": [{"ndim": ">=2", "per": "unit", "measure": "weight", "limit": 0.01, "floor": 1e-3}],
    "zclip": [
        {
            "limit": {
                "z": 2.5,
                "space": "raw",
                "decay": 0.97,
                "warmup": 25,
                "floor": 0,
                "learn": "clipped",
                "to": "reciprocal",
            }
        }
    ],
    "autoclip": [{"limit": {"quantile": 0.1, "window": "all", "warmup": 1, "learn": "raw"}}],
    "adagc": [
        {
            "per": "tensor",
            "limit": {"ratio": 1.04, "decay": 0.99, "warmup": 100, "until": 1, "learn": "clipped"},
        }
    ],
    "skipstep": [
        {
            "measure": measure,
            "limit": {
                "z": 6,
                "space": "raw",
                "window": 128,
                "warmup": 64,
                "floor": 0,
                "learn": "raw",
            },
            "then": "skip",
        }
        for measure in ("loss", "l2")
    ],
    "keras-clipnorm": [{"per": "tensor", "limit": 1}],
    "block-rms": [{"per": "tensor", "measure": "rms", "limit": 1}],
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_the_published_rule(name):
    names = ["skipstep-loss", "skipstep-norm"] if name == "skipstep" else [name]
    named = [{**rule, "name": name} for name, rule in zip(names, PLAIN[name], strict=True)]
    assert clip({"use": name}) == clip(*named)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_explained_is_the_same_policy(name, tmp_path):
    used = load_policy({"version": 1, "clip": [{"use": name, "params": "a.*"}, {"limit": 1}]})
    explained = parse_policy(used.canonical_yaml(), "explained")
    assert explained.sha256 == used.sha256
    assert "use" not in used.canonical_yaml()


def test_keys_beside_it_go_before_those_of_the_preset():
    (rule,) = clip({"use": "agc", "limit": 0.02, "exclude": "head.*", "name": "mine"})
    (plain,) = clip({**PLAIN["agc"][0], "limit": 0.02, "exclude": "head.*", "name": "mine"})
    assert rule == plain


def test_a_statistic_beside_it_changes_single_numbers_of_the_preset():
    (rule,) = clip({"use": "zclip", "limit": {"z": 3, "max": 10}})
    assert rule["limit"] == {**PLAIN["zclip"][0]["limit"], "z": 3, "max": 10}


def test_another_statistic_takes_the_place_of_the_one_of_the_preset():
    (rule,) = clip({"use": "adagc", "limit": {"z": 4}})
    assert (rule["limit"]["z"], "ratio" in rule["limit"]) == (4, False)


@pytest.mark.parametrize("limit", [5, {0: 5, 100: 1}])
def test_a_number_or_a_schedule_beside_it_replaces_the_limit(limit):
    (rule,) = clip({"use": "zclip", "limit": limit})
    (plain,) = clip({"limit": limit, "name": "zclip"})
    assert rule == plain


def test_another_measure_leaves_the_floor_of_the_weights_behind():
    (rule,) = clip({"use": "agc", "measure": "l2"})
    assert "floor" not in rule


def test_a_preset_that_is_used_twice_has_two_names():
    rules = clip({"use": "agc", "params": "a"}, {"use": "agc", "params": "b"}, {"use": "agc"})
    assert [rule["name"] for rule in rules] == ["agc", "agc-2", "agc-3"]


def test_a_name_in_the_file_is_left_to_the_rule_that_has_it():
    rules = clip({"use": "agc"}, {"limit": 1, "name": "agc"})
    assert [rule["name"] for rule in rules] == ["agc-2", "agc"]


def test_a_name_beside_a_preset_of_two_rules_is_the_front_of_both():
    assert [rule["name"] for rule in clip({"use": "skipstep", "name": "spike"})] == [
        "spike-loss",
        "spike-norm",
    ]


def test_a_mistake_below_a_preset_of_two_rules_names_the_item_and_the_line_of_the_file():
    text = "version: 1\nclip:\n  - use: skipstep\n  - use: agc\n    limit: -1\n  - limit: ten\n"
    assert complaints(text) == [
        "policy.yaml:5:5: clip[1].limit must be > 0. Received: -1",
        "policy.yaml:6:5: clip[2].limit must be a number. Received: ten",
    ]


def test_a_mistake_beside_a_preset_of_two_rules_is_told_once():
    text = "version: 1\nclip:\n  - use: skipstep\n    limt: 1\n"
    assert complaints(text) == [
        "policy.yaml:4:5: clip[0].limt is not a key of the format. Did you mean 'limit'?"
    ]


@pytest.mark.parametrize("name", ["agcc", "5", "[agc]", "{agc: 1}"])
def test_an_unknown_preset_is_named_and_nothing_else_is_said_of_its_item(name):
    (line,) = complaints(f"version: 1\nclip:\n  - use: {name}\n    measure: l2\n")
    assert line.startswith("policy.yaml:3:5: clip[0].use must be agc, zclip, autoclip, adagc, ")
    assert line.endswith(f"Received: {name}")


def test_a_preset_without_a_name_is_a_null():
    assert complaints("version: 1\nclip:\n  - use:\n    limit: 1\n") == [
        "policy.yaml:3:5: clip[0].use must not be null. Give it a value or leave the key out"
    ]


def test_one_measure_for_a_preset_of_two_is_refused():
    (line,) = complaints("version: 1\nclip:\n  - use: skipstep\n    measure: l1\n")
    assert line == (
        "policy.yaml:4:5: clip[0].measure must be left out beside use: skipstep, "
        "which is one rule for each of its measures"
    )


def test_nothing_is_selected_below_a_preset_at_its_own_line():
    text = "version: 1\nclip:\n  - use: skipstep\n  - use: agc\n    params: nowhere.*\n"
    policy = parse_policy(text, "policy.yaml")
    with pytest.raises(PolicyError, match=r"policy\.yaml:5:5: clip\[1\]\.params: no "):
        check_against(policy, LAYOUT)
