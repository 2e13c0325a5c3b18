"""Each mistake is one line: where it stands, what was due, what came."""

from __future__ import annotations

import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import load_policy, parse_policy
from gradwatch.policy.locating import SHOWN_MISTAKES


def complaints(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "policy.yaml")
    return str(caught.value).splitlines()


def rule(text: str) -> str:
    """A policy of one rule, its keys from line 3 and column 5 on."""
    return f"version: 1\nclip:\n  - {text}\n"


def test_a_mistake_names_file_line_column_path_rule_and_value():
    text = (
        "version: 1\nmode: enforce\nguard:\n  patience: 3\nclip:\n  - params: '*'\n    limit: -1\n"
    )
    assert complaints(text) == ["policy.yaml:7:5: clip[0].limit must be > 0. Received: -1"]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = "clip:\n  - {limit: 0, per: row}\n  - {name: a}\nmode: on\nversion: 1\nlimit: 1\n"
    assert complaints(text) == [
        "policy.yaml:2:6: clip[0].limit must be > 0. Received: 0",
        "policy.yaml:2:16: clip[0].per must be all, group, layer, tensor, unit or element. "
        "Received: row",
        "policy.yaml:3:5: clip[1].limit is required",
        "policy.yaml:4:1: mode must be enforce or shadow. Received: on",
        "policy.yaml:6:1: limit is not a key of the format. "
        "Known keys: accumulate, clip, detect, guard, layers, mode, version",
    ]


def test_a_flood_of_mistakes_is_counted_rather_than_shown():
    lines = complaints("version: 1\n" + "".join(f"key{i}: 1\n" for i in range(100)))
    assert len(lines) == SHOWN_MISTAKES + 1
    assert lines[-1] == f"policy.yaml:{SHOWN_MISTAKES + 2}:1: and {100 - SHOWN_MISTAKES} more"


NUMBERS = {
    "limit: yes": "must be a number. Received: yes",
    "limit: on": "must be a number. Received: on",
    "limit: no": "must be a number. Received: no",
    "limit: off": "must be a number. Received: off",
    "limit: true": "must be a number. Received: true",
    "limit: ten": "must be a number. Received: ten",
    "limit: '1.0'": "must be a number. Received: '1.0'",
    "limit: 010": "must be a number. Received: '010'",
    "limit: 1:30": "must be a number. Received: 1:30",
    "limit: -1e-7": "must be > 0. Received: -1e-7",
    "limit: 0": "must be > 0. Received: 0",
    "limit: .nan": "must be finite. Received: nan",
    "limit: .inf": "must be finite. Received: inf",
    "limit: 1e999": "must be finite. Received: 1e999",
    "limit:": "must not be null. Give it a value or leave the key out",
    "limit: [1]": "must be a number, a schedule such as {0: 10, 2000: 1}, or a statistic "
    "such as {z: 4}. Received: [1]",
    "limit: {from: 1}": "must be a number, a schedule such as {0: 10, 2000: 1}, or a "
    "statistic such as {z: 4}. Received: {from: 1}",
    "limit: {}": "must hold at least one step. Received: {}",
    "limit: {0: 1, '0': 2}": "must hold each step once. Received: {0: 1, '0': 2}",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_limit_is_a_positive_finite_number_or_a_schedule(text):
    assert complaints(rule(text)) == [f"policy.yaml:3:5: clip[0].limit {NUMBERS[text]}"]


RULES = {
    "limt: 3": "3:5: clip[0].limt is not a key of the format. Did you mean 'limit'?",
    "params:": "3:5: clip[0].params must not be null. Give it a value or leave the key out",
    "params: []": "3:5: clip[0].params must not be empty. "
    "Leave the key out to select by it no further. Received: []",
    "params: ''": "3:5: clip[0].params must not be empty. Received: ''",
    "params: [a, '']": "3:17: clip[0].params[1] must not be empty. Received: ''",
    "params: 5": "3:5: clip[0].params must be text or a list of them. Received: 5",
    "exclude: []": "3:5: clip[0].exclude must not be empty. "
    "Leave the key out to select by it no further. Received: []",
    "types: {a: b}": "3:5: clip[0].types must be text or a list of them. Received: {a: b}",
    "types: [5]": "3:13: clip[0].types[0] must be text. Received: 5",
    "groups: [0, one]": "3:17: clip[0].groups[1] must be a whole number. Received: one",
    "groups: -1": "3:5: clip[0].groups must be >= 0. Received: -1",
    "ndim: '<two'": "3:5: clip[0].ndim must compare with a number of dimensions, "
    "such as <2, >=2 or 2. Received: <two",
    "per: tensors": "3:5: clip[0].per must be all, group, layer, tensor, unit or element. "
    "Received: tensors",
    "measure: l0": "3:5: clip[0].measure must be l1, l2, linf, l<p>, rms, weight, update or loss. "
    "Received: l0",
    "then: explode": "3:5: clip[0].then must be scale, skip, zero, stop or warn. Received: explode",
    "eps: -1": "3:5: clip[0].eps must be >= 0. Received: -1",
    "floor: 1": "3:5: clip[0].floor must be left out unless measure is weight. Received: 1",
    "name: 5": "3:5: clip[0].name must be text. Received: 5",
    "name: nonfinite": "3:5: clip[0].name must be another name: this one is taken by the guard. "
    "Received: nonfinite",
    "name: overflow": "3:5: clip[0].name must be another name: this one is taken by the guard. "
    "Received: overflow",
    'name: "a\\nb"': "3:5: clip[0].name must be one line of at most 64 characters "
    "without blanks around it. Received: 'a\\nb'",
}


@pytest.mark.parametrize("text", RULES)
def test_a_rule_says_what_is_wrong_with_each_key(text):
    assert complaints(rule(f"{text}\n    limit: 1")) == [f"policy.yaml:{RULES[text]}"]


SCHEDULES = {
    "{5: -1}": "3:13: clip[0].limit[5] must be > 0. Received: -1",
    "{-5: 1}": "3:13: clip[0].limit[-5]: a key must be >= 0. Received: -5",
    "{0: 1, x: 2}": "3:19: clip[0].limit.x: a key must be a step, a whole number "
    "without leading zeros. Received: x",
    "{0: 1, 010: 2}": "3:19: clip[0].limit.'010': a key must be a step, a whole number "
    "without leading zeros. Received: '010'",
    "{0: 1, 1.5: 2}": "3:19: clip[0].limit: a key must be a word or a whole number. Received: 1.5",
    "{0: 1, 9: yes}": "3:19: clip[0].limit[9] must be a number. Received: yes",
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_schedule_names_the_point_that_is_wrong(text):
    assert complaints(rule(f"limit: {text}")) == [f"policy.yaml:{SCHEDULES[text]}"]


SECTIONS = {
    "version: 2": "1:1: version must be 1, the only version of the format. Received: 2",
    "version: 1\nguards: {}": "2:1: guards is not a key of the format. Did you mean 'guard'?",
    "version: 1\n5: 1": "2:1: [5] is not a key of the format. "
    "Known keys: accumulate, clip, detect, guard, layers, mode, version",
    "version: 1\n? [a]\n: 1": "2:3: the policy: a key must be a word or a whole number",
    "version: 1\n~: 1": "2:1: the policy: a key must be a word or a whole number. Received: null",
    "mode: shadow": "1:1: version is required",
    "version: 1\nmode: observe": "2:1: mode must be enforce or shadow. Received: observe",
    "version: 1\nlayers: block": "2:1: layers must be parameter, module or {depth: 2}. "
    "Received: block",
    "version: 1\nlayers: {depth: 0}": "2:10: layers.depth must be >= 1. Received: 0",
    "version: 1\nlayers: {}": "2:1: layers.depth is required",
    "version: 1\nguard:": "2:1: guard must not be null. Give it a value or leave the key out",
    "version: 1\nguard: skip": "2:1: guard must be a mapping of keys. Received: skip",
    "version: 1\nguard: {nonfinite: no}": "2:9: guard.nonfinite must be skip, zero, stop or none. "
    "Received: no",
    "version: 1\nguard: {patience: 0}": "2:9: guard.patience must be >= 1. Received: 0",
    "version: 1\nguard: {patience: 1.5}": "2:9: guard.patience must be a whole number. "
    "Received: 1.5",
    "version: 1\nguard: {budget: 50}": "2:9: guard.budget must be skips/steps, such as 50/1000. "
    "Received: 50",
    "version: 1\nguard: {budget: 9/9}": "2:9: guard.budget must allow at least 1 skip, "
    "and fewer skips than steps. Received: 9/9",
    "version: 1\nclip: {limit: 1}": "2:1: clip must be a list. Received: {limit: 1}",
    "version: 1\nclip: [1.0]": "2:8: clip[0] must be a mapping of keys. Received: 1.0",
    "version: 1\ndetect: {explodng: none}": "2:10: detect.explodng is not a key of the format. "
    "Did you mean 'exploding'?",
    "version: 1\ndetect: {spike: off}": "2:10: detect.spike must be a mapping of keys, or none. "
    "Received: off",
    "version: 1\ndetect: {spike: {need: 2}}": "2:10: detect.spike must have need <= of "
    "(here 2 of 1). Received: {need: 2}",
    "version: 1\ndetect: {spike: {window: 9}}": "2:10: detect.spike must have warmup <= window "
    "(here 50 and 9). Received: {window: 9}",
    "version: 1\ndetect: {spike: {then: skip}}": "2:18: detect.spike.then must be record, "
    "warn or stop. Received: skip",
    "version: 1\ndetect: {vanishing: {share: 2}}": "2:22: detect.vanishing.share must be < 1. "
    "Received: 2",
}


@pytest.mark.parametrize("text", SECTIONS)
def test_a_section_says_what_is_wrong_with_each_key(text):
    assert complaints(text) == [f"policy.yaml:{SECTIONS[text]}"]


def test_a_key_that_is_given_twice_names_both_places():
    assert complaints("version: 1\nmode: shadow\nmode: enforce\n") == [
        "policy.yaml:3:1: mode is given twice, first at 2:1"
    ]


def test_a_name_that_is_used_twice_names_both_rules():
    text = "version: 1\nclip:\n  - {limit: 1, name: a}\n  - {limit: 2, name: a}\n"
    assert complaints(text) == [
        "policy.yaml:4:16: clip[1].name must be unique. Received: a, as in clip[0]"
    ]


def test_a_repeated_name_is_told_beside_other_mistakes():
    text = "version: 1\nclip:\n  - {limit: 1, name: a}\n  - {limit: 0, name: a}\n"
    assert [line.split(": ")[1] for line in complaints(text)] == [
        "clip[1].limit must be > 0. Received",
        "clip[1].name must be unique. Received",
    ]


def test_a_dict_is_told_its_mistakes_without_line_numbers():
    with pytest.raises(PolicyError) as caught:
        load_policy({"version": 1, "clip": [{"limit": -1, "nme": "a"}]})
    assert str(caught.value).splitlines() == [
        "<dict>: clip[0].limit must be > 0. Received: -1",
        "<dict>: clip[0].nme is not a key of the format. Did you mean 'name'?",
    ]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


DICTS = {
    "a boolean for a number": (
        {"version": 1, "clip": [{"limit": True}]},
        "clip[0].limit must be a number. Received: True",
    ),
    "a boolean for a word": (
        {"version": 1, "clip": [{"limit": 1, "name": True}]},
        "clip[0].name must be text: YAML reads yes, no, on and off as booleans unless quoted. "
        "Received: True",
    ),
    "a boolean for a version": (
        {"version": True},
        "version must be 1, the only version of the format. Received: True",
    ),
    "a key that is no word": (
        {"version": 1, None: 2},
        "the policy: a key must be a word or a whole number. Received: null",
    ),
    "an object": (
        {"version": 1, "clip": [{"limit": b"1"}]},
        "clip[0].limit must be a number, text, a list or a mapping. Received: b'1'",
    ),
    "an object that does not even print": (
        {"version": 1, "clip": [{"limit": Unprintable()}]},
        "clip[0].limit must be a number, text, a list or a mapping. Received: <Unprintable>",
    ),
    "half a surrogate pair": (
        {"version": 1, "clip": [{"limit": 1, "name": "\ud800"}]},
        "clip[0].name holds what is not text. Received: '\\ud800'",
    ),
    "an endless integer": (
        {"version": 1, "clip": [{"limit": 10**5000}]},
        "clip[0].limit must be finite. Received: inf",
    ),
}


@pytest.mark.parametrize("case", DICTS)
def test_a_dict_may_hold_what_no_file_can(case):
    mapping, expected = DICTS[case]
    with pytest.raises(PolicyError) as caught:
        load_policy(mapping)
    assert str(caught.value) == f"<dict>: {expected}"


def test_a_dict_that_holds_itself_is_refused():
    endless: dict[str, object] = {"version": 1}
    endless["clip"] = [endless]
    with pytest.raises(PolicyError, match="<dict>: nested deeper than 16 levels"):
        load_policy(endless)


def test_a_dict_that_is_too_large_is_refused():
    with pytest.raises(PolicyError, match="<dict>: a policy must hold at most 10000 values"):
        load_policy({"version": 1, "clip": [{"limit": 1}] * 6000})
