"""A policy in words."""

from __future__ import annotations

import pytest

from gradwatch.policy import KINDS, load_policy
from gradwatch.policy.sentences import sentences


def said(**sections: object) -> str:
    return "\n".join(sentences(load_policy({"version": 1, **sections})))


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            {"limit": 0.5, "then": "skip", "name": "huge"},
            "clip huge: on all parameters, as one vector, where the L2 norm exceeds 0.5, the step "
            "is skipped.",
        ),
        (
            {"limit": {0: 10, 2000: 1}, "per": "layer", "params": ["conv*", "head.*"]},
            "clip per-layer: on parameters conv* or head.*, each layer as one vector, where the L2 "
            "norm exceeds a limit of 10 at step 0, then 1 at step 2000 (linear between), it is "
            "scaled down to that.",
        ),
        (
            {"limit": 3, "then": "stop", "types": ["Embedding"], "groups": [0], "ndim": ">=2"},
            "clip global: on all parameters of Embedding in group 0 with ndim >=2, as one vector, "
            "where the L2 norm exceeds 3, the run is stopped before the update.",
        ),
        (
            {"limit": 3, "then": "warn", "exclude": "head.*", "per": "tensor"},
            "clip per-tensor: on all parameters except head.*, each tensor by itself, where the L2 "
            "norm exceeds 3, a warning is logged.",
        ),
    ],
)
def test_each_rule_is_a_sentence(rule, sentence):
    assert sentence in said(clip=[rule]).splitlines()


def test_a_loop_that_accumulates_is_told_what_is_done_to_its_short_windows():
    text = said(accumulate={"steps": 4, "drive": "loop"})
    assert "multiplies the gradients of a shorter window" in text
    assert "only counts" not in text
    assert "only counts" in said(accumulate={"steps": 4, "drive": "loop", "weigh": "sum"})


def test_a_shadow_policy_says_that_it_touches_nothing():
    assert "nothing is touched" in said(mode="shadow", clip=[{"limit": 1}])


def test_the_guard_says_when_it_gives_up():
    text = said(guard={"nonfinite": "stop", "patience": 3, "budget": "50/1000"})
    assert "NaN or inf in a gradient stops the run before the update." in text
    assert "3 skipped steps in a row stop the run." in text
    assert "50 skipped steps within 1000 stop the run." in text


def test_detectors_that_are_switched_off_or_stop_the_run_are_named():
    assert f"detect: all {len(KINDS)} kinds.\n" in said()
    assert f"detect: all {len(KINDS)} kinds but spike." in said(detect={"spike": "none"})
    only = {kind: "none" for kind in KINDS if kind != "stuck"}
    assert "detect: stuck." in said(detect=only)
    assert "detect: nothing." in said(detect={**only, "stuck": "none"})
    assert "kinds. exploding stops the run." in said(detect={"exploding": {"then": "stop"}})


def test_layers_by_depth_are_explained():
    assert "first 2 parts" in said(layers={"depth": 2})
    assert "Each parameter is a layer." in said(layers="parameter")
