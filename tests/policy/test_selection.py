"""Which parameters a rule is about."""

from __future__ import annotations

import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import check_against, load_policy, parse_policy, select
from gradwatch.records import Layout, Parameter

PARAMETERS = [
    Parameter(name="embed.weight", shape=(20, 8), module="Embedding", aliases=("head.out.weight",)),
    Parameter(name="blocks.0.fc.weight", shape=(8, 8), module="Linear"),
    Parameter(name="blocks.0.fc.bias", shape=(8,), module="Linear"),
    Parameter(name="blocks.0.norm.weight", shape=(8,), module="LayerNorm"),
    Parameter(name="blocks.1.fc.weight", shape=(8, 8), module="Linear", group=1),
    Parameter(name="blocks.1.fc.bias", shape=(8,), module="Linear", group=1),
    Parameter(name="scale", shape=(), module="Net", group=1),
]
LAYOUT = Layout.of(PARAMETERS)


def selected(**selectors) -> list[str]:
    rule = load_policy({"version": 1, "clip": [{"limit": 1, **selectors}]}).clip[0]
    return [LAYOUT.parameters[i].name for i in select(rule, LAYOUT)]


EVERYTHING = [parameter.name for parameter in PARAMETERS]


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        ({}, EVERYTHING),
        ({"params": "*"}, EVERYTHING),
        ({"params": "scale"}, ["scale"]),
        ({"params": "(root)"}, ["scale"]),
        ({"params": "blocks.0.fc"}, ["blocks.0.fc.weight", "blocks.0.fc.bias"]),
        ({"params": "*.bias"}, ["blocks.0.fc.bias", "blocks.1.fc.bias"]),
        ({"params": "blocks.[1-9].*"}, ["blocks.1.fc.weight", "blocks.1.fc.bias"]),
        ({"params": ["scale", "embed"]}, ["embed.weight", "scale"]),
        ({"params": "head.*"}, ["embed.weight"]),
        ({"params": "head.out"}, ["embed.weight"]),
        ({"exclude": "blocks.*"}, ["embed.weight", "scale"]),
        ({"params": "blocks.0.*", "exclude": ["*.bias", "*norm*"]}, ["blocks.0.fc.weight"]),
        ({"types": "LayerNorm"}, ["blocks.0.norm.weight"]),
        ({"types": ["Embedding", "Net"]}, ["embed.weight", "scale"]),
        ({"groups": 1}, EVERYTHING[4:]),
        ({"groups": [0, 1]}, EVERYTHING),
        ({"ndim": "<1"}, ["scale"]),
        ({"ndim": "<= 1", "groups": 0}, ["blocks.0.fc.bias", "blocks.0.norm.weight"]),
        ({"ndim": 2, "types": "Linear"}, ["blocks.0.fc.weight", "blocks.1.fc.weight"]),
        ({"ndim": "==0"}, ["scale"]),
        ({"ndim": ">1"}, ["embed.weight", "blocks.0.fc.weight", "blocks.1.fc.weight"]),
        ({"ndim": ">=2", "groups": 1}, ["blocks.1.fc.weight"]),
    ],
)
def test_selectors_narrow_each_other_and_lists_widen(selectors, names):
    assert selected(**selectors) == names


def test_the_layer_path_is_that_of_the_policys_layers():
    rule = load_policy({"version": 1, "clip": [{"limit": 1, "params": "blocks"}]}).clip[0]
    deep = Layout.of(PARAMETERS, 1)
    assert [deep.parameters[i].name for i in select(rule, deep)] == EVERYTHING[1:6]


def refused(**selectors) -> str:
    with pytest.raises(PolicyError) as caught:
        selected(**selectors)
    return str(caught.value).removeprefix("<dict>: clip[0]")


@pytest.mark.parametrize(
    ("selectors", "complaint"),
    [
        (
            {"params": "block.0.fc.bias"},
            ".params: no parameter matches block.0.fc.bias. Near names: blocks.0.fc.bias, "
            "blocks.1.fc.bias, blocks.0.fc, blocks.0.fc.weight, blocks.1.fc",
        ),
        (
            {"params": ["*", "x"]},
            ".params[1]: no parameter matches x. There are: embed.weight, head.out.weight, embed, "
            "head.out, blocks.0.fc.weight and 9 more",
        ),
        (
            {"params": "Embed.*"},
            ".params: no parameter matches Embed.*. Near names: embed, embed.weight",
        ),
        (
            {"exclude": "*.bais"},
            ".exclude: no parameter matches *.bais. There are: embed.weight, head.out.weight, "
            "embed, head.out, blocks.0.fc.weight and 9 more",
        ),
        (
            {"types": "Embeding"},
            ".types: no module of type Embeding owns a parameter. Near names: Embedding",
        ),
        ({"groups": 2}, ".groups: there is no parameter group 2. There are: [0, 1]"),
        ({"ndim": ">3"}, ".ndim: no parameter has ndim >3. There are: [0, 1, 2]"),
        ({"params": "scale", "groups": 0}, ": its selectors match no parameter together"),
        ({"exclude": "*"}, ": its selectors match no parameter together"),
    ],
)
def test_a_selector_that_matches_nothing_is_refused_with_what_there_is(selectors, complaint):
    assert refused(**selectors) == complaint


def test_every_selector_that_matches_nothing_is_told_with_its_place():
    policy = parse_policy(
        "version: 1\nclip:\n  - {limit: 1, types: Lin}\n  - limit: 1\n    groups: [0, 7]\n",
        "policy.yaml",
    )
    with pytest.raises(PolicyError) as caught:
        check_against(policy, LAYOUT)
    assert [line.partition(" no ")[0] for line in str(caught.value).splitlines()] == [
        "policy.yaml:3:16: clip[0].types:",
        "policy.yaml:5:17: clip[1].groups[1]: there is",
    ]


def test_a_policy_that_fits_passes():
    check_against(parse_policy("version: 1\nclip: [{limit: 1, groups: [0, 1]}]"), LAYOUT)
    check_against(load_policy(None), LAYOUT)
