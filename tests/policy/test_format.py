"""What the format knows works, and what it does not know is refused by name."""

from __future__ import annotations

import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import load_policy, parse_policy


def complaints(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "policy.yaml")
    return str(caught.value).splitlines()


def test_one_mistake_does_not_hide_another():
    assert complaints(
        "version: 1\nclip: [{limit: {z: -1}, per: x}, {use: agcc}, {use: agc, nme: a}]"
    ) == [
        "policy.yaml:2:17: clip[0].limit.z must be > 0. Received: -1",
        "policy.yaml:2:25: clip[0].per must be all, group, layer, tensor, unit or element. "
        "Received: x",
        "policy.yaml:2:35: clip[1].use must be agc, zclip, autoclip, adagc, skipstep, "
        "keras-clipnorm or block-rms. Received: agcc",
        "policy.yaml:2:58: clip[2].nme is not a key of the format. Did you mean 'name'?",
    ]


def test_what_works_is_not_refused():
    for per in ("all", "group", "layer", "tensor", "element"):
        for then in ("scale", "skip", "zero", "stop", "warn"):
            for measure in ("l1", "l2", "linf", "l3.5", "rms"):
                rule = {"per": per, "then": then, "measure": measure, "limit": 1}
                assert load_policy({"version": 1, "clip": [rule]}).clip[0].per == per
    for nonfinite in ("skip", "zero", "stop", "none"):
        policy = load_policy({"version": 1, "guard": {"nonfinite": nonfinite}})
        assert policy.guard.nonfinite == nonfinite


def test_what_is_seldom_used_is_decoded_and_written_like_all_else():
    text = (
        "version: 1\naccumulate: {steps: {0: 1, 1000: 4}, drive: loop, sync: every}\n"
        "guard: {nonfinite: zero}\n"
        "clip:\n  - {measure: weight, per: unit, limit: 1e-2, floor: 1e-3, then: zero}\n"
        "  - {limit: {quantile: 0.9, window: 128}}\n"
    )
    policy = parse_policy(text)
    assert parse_policy(policy.canonical_yaml()) == policy
    assert complaints(text.replace("quantile", "quantil").replace("drive: loop", "drive: me")) == [
        "policy.yaml:2:38: accumulate.drive must be hook or loop. Received: me",
        "policy.yaml:6:14: clip[1].limit.quantil is not a key of the format. "
        "Did you mean 'quantile'?",
    ]
