"""What went bad first, from flags: what counts as evidence, and what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.rules.culprit import Clues, Forward, Pass, of_step
from gradwatch.rules.culprit_explosion import of_explosion
from gradwatch.rules.culprit_forward import Call, Flag, flag_of, of_forward
from gradwatch.rules.culprit_gradients import ModuleGradient, modules_of
from gradwatch.rules.culprit_weights import BadWeight

FINE, MASK, MINUS, BAD = Flag.FINE, Flag.MASK, Flag.MINUS, Flag.BAD
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("low", "high", "flag"),
    [
        (-1.0, 2.0, FINE),
        (0.0, 0.0, FINE),
        (-INF, 0.0, MASK),
        (-INF, 2.0, MINUS),
        (-INF, -INF, MINUS),
        (0.0, INF, BAD),
        (-INF, INF, BAD),
        (NAN, NAN, BAD),
        (NAN, 1.0, BAD),
    ],
)
def test_flags_tell_masks_from_what_is_bad(low, high, flag):
    assert flag_of(low, high) is flag


def used(module: str) -> BadWeight:
    return BadWeight((module,), is_used=True)


def test_the_innermost_module_that_makes_bad_of_good_is_named():
    calls = [
        Call("a", FINE, FINE, 0),
        Call("b.inner", FINE, BAD, 1),
        Call("b", FINE, BAD, 1),
        Call("c", BAD, BAD, 3),
        Call("", FINE, BAD, 0),
    ]
    found = of_forward(calls)
    assert (found.origin, found.module) == ("forward", "b.inner")


def test_what_happens_between_modules_is_the_one_that_holds_them():
    calls = [
        Call("b.x", FINE, FINE, 0),
        Call("b.y", BAD, BAD, 1),
        Call("b", FINE, BAD, 0),
        Call("", FINE, BAD, 0),
    ]
    found = of_forward(calls)
    assert (found.module, found.near) == ("b", ("b.x", "b.y"))
    assert "between b.x and b.y" in found.message


def test_a_logarithm_of_zero_that_something_makes_nan_of_names_nobody():
    calls = [Call("log", FINE, MINUS, 0), Call("norm", MINUS, BAD, 1), Call("", FINE, BAD, 0)]
    found = of_forward(calls)
    assert (found.origin, found.module, found.near) == (None, None, ("log", "norm"))


def test_minus_infinity_that_stays_within_the_model_is_a_mask():
    calls = [Call("scores", FINE, MINUS, 0), Call("softmax", MINUS, FINE, 1), Call("", FINE, FINE)]
    assert of_forward(calls) is None


def test_bad_values_that_the_model_masks_are_found_all_the_same():
    calls = [Call("a", FINE, BAD, 0), Call("pool", BAD, FINE, 1), Call("", FINE, FINE, 0)]
    found = of_forward(calls)
    assert found.module == "a"
    assert "masks it" in found.message


def test_a_bad_weight_is_named_before_the_module_that_shows_it():
    calls = [Call("block", FINE, BAD, 0), Call("", FINE, BAD, 0)]
    found = of_forward(calls, [used("block.linear")])
    assert (found.origin, found.module) == ("weight", "block.linear")
    assert of_forward(calls, [used("elsewhere")]).origin is None  # which the block may use
    several = of_forward(calls, [used("block.a"), used("block.b")])
    assert (several.origin, several.module) == ("weight", None)


def test_a_bad_weight_that_the_step_has_not_used_is_no_evidence():
    calls = [Call("block", FINE, BAD, 0), Call("", FINE, BAD, 0)]
    found = of_forward(calls, [BadWeight(("block.frozen",))])
    assert (found.origin, found.near) == (None, ("block", "block.frozen"))
    own = of_forward(calls, [BadWeight(("block",))])
    assert (own.origin, own.module) == ("weight", "block")


def test_without_a_forward_pass_a_bad_weight_is_named_by_gradients():
    for is_used, origin in ((True, "weight"), (False, None)):
        clues = Clues(bad_weights=[BadWeight(("a",), is_used)])
        found = of_step(clues, gradients(False, False), 1.0)
        assert (found.origin, found.module) == (origin, "a" if origin else None)


def test_gradients_that_go_bad_beside_a_bad_weight_name_it():
    """An inf in front of tanh has no gradient itself, and spoils all behind it."""
    for module, origin in (("m0", "weight"), ("m1", "weight"), ("m2", None)):
        clues = Clues(bad_weights=[BadWeight((module,))], is_order_sure=True)
        found = of_step(clues, gradients(True, False, False), 1.0)
        assert (found.origin, found.module) == (origin, module if origin else None)


def test_a_shared_weight_is_named_with_all_who_have_it():
    calls = [Call("embed", FINE, FINE, 0), Call("head", FINE, BAD, 1), Call("", FINE, BAD, 0)]
    found = of_forward(calls, [BadWeight(("embed", "head"), is_used=True)])
    assert (found.origin, found.module) == ("weight", "embed")
    assert "weights of embed (shared with head) hold NaN" in found.message


def test_a_mask_that_may_leave_nothing_of_a_row_names_nobody():
    calls = [Call("attention", MASK, BAD, 0), Call("", FINE, BAD, 0)]
    found = of_forward(calls)
    assert (found.origin, found.near) == (None, ("attention",))
    behind = [Call("attention", MASK, FINE, 0), Call("mlp", FINE, BAD, 1), Call("", MASK, BAD, 0)]
    assert of_forward(behind).module == "mlp"


def test_what_a_hook_makes_of_the_input_is_not_told_as_the_input():
    calls = [Call("", BAD, BAD, 0)]
    forward = Forward(evidence="replay", passes=[Pass(FINE, BAD, calls)], repeated=0)
    found = of_step(Clues(forward=forward), gradients(False), NAN)
    assert (found.origin, found.module) == (None, None)
    assert "not what reached it" in found.message


def test_the_order_of_another_backward_pass_names_nobody():
    found = of_step(Clues(), gradients(True, False, False), 1.0)
    assert (found.origin, found.module, found.near) == (None, None, ("m1",))
    sure = of_step(Clues(is_order_sure=True), gradients(True, False, False), 1.0)
    assert (sure.origin, sure.module) == ("gradient", "m1")


def gradients(*finite: bool) -> list[ModuleGradient]:
    return [ModuleGradient(f"m{i}", one) for i, one in enumerate(finite)]


def test_without_a_forward_pass_all_bad_says_nothing():
    for loss in (None, NAN, 1.0):
        found = of_step(Clues(), gradients(False, False), loss)
        assert (found.origin, found.module) == (None, None)
        assert found.message.endswith("(detect.culprit: replay would tell more)")


def test_the_loss_is_blamed_by_exclusion_alone():
    fine = Forward(evidence="replay", passes=[Pass(FINE, FINE)])
    assert of_step(Clues(forward=fine), gradients(False, False), NAN).origin == "loss"
    for missing in (
        Forward(evidence="replay", passes=[Pass(FINE, FINE)], unseen=1),
        Forward(evidence="replay", unknown="nobody looked"),
        Forward(evidence="replay", passes=[Pass(FINE, BAD)], unknown="not run again"),
        Forward(evidence="replay", passes=[Pass(FINE, MINUS)]),
    ):
        found = of_step(Clues(forward=missing), gradients(False, False), NAN)
        assert found.origin is None


def test_minus_infinity_that_the_model_puts_out_clears_nobody():
    """-inf times a target of 0 is NaN."""
    calls = [Call("log", FINE, MINUS, 0), Call("", FINE, MINUS, 0)]
    forward = Forward(evidence="live", passes=[Pass(FINE, MINUS, calls)])
    found = of_step(Clues(forward=forward), gradients(False, False), NAN)
    assert found.origin is None
    assert "which log was the first to hold" in found.message
    clues = Clues(forward=forward, is_order_sure=True)
    in_backward = of_step(clues, gradients(True, False), 1.0)
    assert in_backward.module == "m1"


def test_one_of_several_losses_is_not_told_as_a_backward_pass():
    """The head of a loss that is fine has a finite gradient, that of a bad one has not."""
    fine = Forward(evidence="live", passes=[Pass(FINE, FINE)])
    for forward in (None, fine):
        for loss in (NAN, None):
            found = of_step(Clues(forward=forward), gradients(True, False, False), loss)
            assert (found.origin, found.module) == (None, None)


def test_what_was_not_looked_into_clears_and_blames_nobody():
    unknown = Forward(evidence="live", passes=[Pass(FINE, Flag.UNKNOWN)])
    assert of_step(Clues(forward=unknown), gradients(False, False), NAN).origin is None
    calls = [Call("dec", Flag.UNKNOWN, BAD, 0), Call("", FINE, BAD, 0)]
    assert of_forward(calls).origin is None


def test_a_weight_without_a_bias_as_witness_names_nobody():
    """Its gradient is bad because of what it was given, or of what it was handed back."""
    (last,) = modules_of(["m.weight"], [False], [0])
    found = of_step(Clues(), [ModuleGradient("head", True), last], 1.0)
    assert (found.origin, found.near) == (None, ("m",))


def test_weights_that_another_optimizer_spoilt_name_nobody():
    found = of_step(Clues(foreign=["a"], bad_weights=[used("b")]), gradients(False), NAN)
    assert found.origin is None


def test_a_finite_bias_beside_a_bad_weight_points_to_what_the_module_was_given():
    (found,) = modules_of(["m.weight", "m.bias"], [False, True], [1, 0])
    assert found.bias_only
    culprit = of_step(Clues(), [found], 1.0)
    assert culprit.origin is None
    assert culprit.near == ("m",)


def test_bad_gradients_in_two_places_name_nobody():
    found = of_step(Clues(), gradients(True, False, True, False), 1.0)
    assert (found.origin, found.module) == (None, None)


def test_modules_stand_in_the_order_of_their_first_parameter():
    names = ["a.weight", "a.bias", "b.weight", "scale"]
    found = modules_of(names, [True, True, False, True], [3, 2, 1, 0])
    assert [(one.module, one.is_finite) for one in found] == [
        ("(model)", True), ("b", False), ("a", True),
    ]  # fmt: skip


flags = st.sampled_from(list(Flag))
calls_of = st.lists(st.tuples(flags, flags), min_size=1, max_size=6).map(
    lambda pairs: (
        [Call(f"m{i}", a, b, i) for i, (a, b) in enumerate(pairs[:-1])] + [Call("", *pairs[-1], 0)]
    )
)


@given(
    calls=calls_of,
    finite=st.lists(st.booleans(), min_size=1, max_size=5),
    loss=st.sampled_from([None, 1.0, NAN]),
    weights=st.lists(
        st.builds(
            BadWeight,
            st.sampled_from([("m0",), ("m1",), ("",), ("m0", "m2")]),
            st.booleans(),
        ),
        max_size=2,
    ),
    repeated=st.booleans(),
    sure=st.booleans(),
)
def test_whatever_comes_a_name_has_a_reason(calls, finite, loss, weights, repeated, sure):
    """A module is named only with an origin, and every culprit says something."""
    one = Pass(calls[-1].inputs, calls[-1].outputs, calls)
    forward = Forward(
        evidence="replay" if repeated else "live", passes=[one], repeated=0 if repeated else None
    )
    clues = Clues(bad_weights=weights, forward=forward, is_order_sure=sure)
    found = of_step(clues, gradients(*finite), loss)
    assert found.message
    if found.module is not None:
        assert found.origin in ("weight", "forward", "gradient")
    if found.origin is None:
        assert found.message.startswith("not determined")
    if found.origin == "loss":
        assert loss is not None
        assert not math.isfinite(loss)


LAYERS = ["head", "b2", "b1", "stem"]


def exploded(now, loss=None, before_loss=1.0):
    before = np.ones((50, 4)) * np.exp(0.1 * np.random.default_rng(0).standard_normal((50, 4)))
    return of_explosion(LAYERS, before, np.array(now), [before_loss] * 50, loss)


def test_an_explosion_is_told_as_an_order_of_layers():
    found = exploded([1.1, 0.9, 30.0, 40.0], loss=1.0)
    assert (found.origin, found.module, found.near) == (None, None, ("b1", "b2"))
    assert "grown from b1 on" in found.message


def test_a_loss_that_has_grown_as_all_gradients_have_is_told_and_not_blamed():
    """One that is an exponential of the weights grows so, too."""
    alike = exploded([900, 1100, 1000, 950], loss=1000.0)
    assert (alike.origin, alike.near) == (None, ("the loss",))
    assert exploded([900, 1100, 1000, 950], loss=None).near == ("head",)
    assert exploded([900, 1100, 1000, 950], loss=2.0).near == ("head",)
    assert exploded([900, 1100, 1000, 9], loss=1000.0).near == ("head",)
    assert "no loss was logged" in exploded([900, 1100, 1000, 950], loss=None).message


def test_an_explosion_without_a_past_says_so():
    found = of_explosion(LAYERS, np.empty((0, 4)), np.ones(4), [], 1.0)
    assert found.message.startswith("not determined")
