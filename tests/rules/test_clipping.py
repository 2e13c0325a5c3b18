"""The algebra of clipping, on NumPy and on torch: the same rules, the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.rules.arrays import NUMPY, Arrays
from gradwatch.rules.clipping import Rule, decide
from gradwatch.rules.limits import limit_at
from gradwatch.torch.arrays import TorchArrays

LIBRARIES = {"numpy": NUMPY, "torch": TorchArrays(torch.device("cpu"))}


def vector(xp: Arrays, values: list[float], dtype: str = "float32"):
    if xp is NUMPY:
        return np.array(values, dtype=dtype)
    return torch.tensor(values, dtype=getattr(torch, dtype))


def on_host(vector) -> np.ndarray:
    return np.asarray(vector, dtype=np.float64)


norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
limits = st.floats(1e-3, 1e3)


@st.composite
def chains(draw, scales_only=True):
    """A chain over 6 tensors: each rule selects some, in units of some."""
    rules, bounds = [], []
    for k in range(draw(st.integers(1, 4))):
        tensors = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
        units = draw(st.sampled_from(["all", "tensor", "pairs"]))
        unit_of = {"all": None, "tensor": sorted(tensors), "pairs": [t // 2 for t in tensors]}
        then = "scale" if scales_only else draw(st.sampled_from(["scale", "skip", "warn"]))
        rules.append((f"r{k}", then, tensors, unit_of[units]))
        bounds.append(draw(limits))
    return rules, bounds


def built(rules, xp: Arrays) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            name=name,
            then=then,
            tensors=xp.indices(tensors),
            unit_of=None if unit_of is None else xp.indices(unit_of),
            num_units=6,
        )
        for name, then, tensors, unit_of in rules
    )


def scaled_one_rule_at_a_time(gradients: list[np.ndarray], rules, bounds) -> list[np.ndarray]:
    """The chain on real gradients in float64, measuring again before each rule."""
    gradients = [gradient.copy() for gradient in gradients]
    for (_, _, tensors, unit_of), limit in zip(rules, bounds, strict=True):
        units = [0] * len(tensors) if unit_of is None else unit_of
        for unit in set(units):
            members = [t for t, u in zip(tensors, units, strict=True) if u == unit]
            norm = math.sqrt(sum(float(np.sum(gradients[t] ** 2)) for t in members))
            for t in members:
                gradients[t] = gradients[t] * min(1.0, limit / norm if norm else 1.0)
    return gradients


@pytest.mark.parametrize("library", LIBRARIES)
@given(values=norms, limit=limits)
def test_the_norm_after_clipping_is_within_the_limit(library, values, limit):
    xp = LIBRARIES[library]
    decision = decide((Rule(name="r", then="scale"),), {2.0: vector(xp, values)}, [limit], xp)
    after = np.linalg.norm(on_host(decision.coefs_P) * on_host(vector(xp, values)))
    assert after <= limit * (1 + 1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@given(values=norms, limit=limits)
def test_a_norm_within_the_limit_is_left_alone(library, values, limit):
    xp = LIBRARIES[library]
    values = [v / np.linalg.norm(values) * limit * 0.999 for v in values]
    decision = decide((Rule(name="r", then="scale"),), {2.0: vector(xp, values)}, [limit], xp)
    assert (on_host(decision.coefs_P) == 1.0).all()
    assert not decision.over[0]


@pytest.mark.parametrize("library", LIBRARIES)
@given(chain=chains(), seed=st.integers(0, 2**32 - 1))
def test_one_pass_equals_measuring_again_before_each_rule(library, chain, seed):
    xp = LIBRARIES[library]
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=5) * 10 ** rng.uniform(-3, 3) for _ in range(6)]
    measured = vector(xp, [float(np.linalg.norm(g)) for g in gradients], "float64")
    rules, bounds = chain
    decision = decide(built(rules, xp), {2.0: measured}, bounds, xp)
    expected = scaled_one_rule_at_a_time(gradients, rules, bounds)
    for gradient, coef, reference in zip(
        gradients, on_host(decision.coefs_P), expected, strict=True
    ):
        np.testing.assert_allclose(gradient * coef, reference, rtol=1e-12, atol=1e-300)


@given(
    chain=chains(scales_only=False), values=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6)
)
def test_numpy_and_torch_decide_alike(chain, values):
    rules, bounds = chain
    numpy, torch_ = (
        decide(built(rules, xp), {2.0: vector(xp, values)}, bounds, xp) for xp in LIBRARIES.values()
    )
    # Four rules in float32, each of which rounds a norm, a quotient and a product by up to 6e-8.
    np.testing.assert_allclose(on_host(numpy.coefs_P), on_host(torch_.coefs_P), rtol=7e-7)
    np.testing.assert_allclose(float(numpy.total_norm), float(torch_.total_norm), rtol=3e-7)


@given(chain=chains(), values=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_clipping_what_was_clipped_changes_nothing_where_units_do_not_overlap(chain, values):
    rules, bounds = chain
    first = decide(
        built(rules[:1], NUMPY), {2.0: vector(NUMPY, values, "float64")}, bounds[:1], NUMPY
    )
    again = decide(
        built(rules[:1], NUMPY),
        {2.0: vector(NUMPY, values, "float64") * first.coefs_P},
        bounds[:1],
        NUMPY,
    )
    np.testing.assert_allclose(again.coefs_P, 1.0, rtol=1e-12)


def test_rules_run_in_order_and_each_sees_what_the_one_above_left():
    # Each tensor to 3 first: the total is 3 sqrt(2) = 4.24, which the second rule brings to 1.
    per_tensor = Rule(name="t", then="scale", unit_of=NUMPY.indices([0, 1]), num_units=2)
    whole = Rule(name="w", then="scale")
    norms_P = vector(NUMPY, [300.0, 4.0], "float64")
    decision = decide((per_tensor, whole), {2.0: norms_P}, [3.0, 1.0], NUMPY)
    np.testing.assert_allclose(norms_P * decision.coefs_P, [1 / math.sqrt(2)] * 2, rtol=1e-12)
    # The other way round the small tensor is all but lost.
    decision = decide((whole, per_tensor), {2.0: norms_P}, [1.0, 3.0], NUMPY)
    np.testing.assert_allclose(norms_P * decision.coefs_P, [300, 4] / np.hypot(300, 4), rtol=1e-12)


def test_a_rule_that_does_not_scale_compares_the_raw_norm_behind_a_tight_clip():
    tight = Rule(name="tight", then="scale")
    skip = Rule(name="skip", then="skip")
    decision = decide((tight, skip), {2.0: vector(NUMPY, [100.0])}, [1.0, 50.0], NUMPY)
    assert [bool(over) for over in decision.over] == [True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_not_scaled_and_is_over_a_skipping_limit(bad):
    rules = (Rule(name="scale", then="scale"), Rule(name="skip", then="skip"))
    decision = decide(rules, {2.0: vector(NUMPY, [1.0, bad])}, [0.5, 10.0], NUMPY)
    assert (decision.coefs_P == 1.0).all()
    assert [bool(over) for over in decision.over] == [False, True]


def test_a_unit_without_a_finite_norm_does_not_touch_the_others():
    rule = Rule(name="t", then="scale", unit_of=NUMPY.indices([0, 1]), num_units=2)
    decision = decide((rule,), {2.0: vector(NUMPY, [math.inf, 4.0])}, [1.0], NUMPY)
    np.testing.assert_allclose(decision.coefs_P, [1.0, 0.25])


def test_an_updates_clipped_to_one_over_i_has_norm_one_over_i():
    # The invariant of optax's own test: ([500, 5], [300, 3]) clipped to 1/i, for i = 1..50.
    norms_P = vector(NUMPY, [math.hypot(500, 5), math.hypot(300, 3)], "float64")
    for i in range(1, 51):
        decision = decide((Rule(name="r", then="scale"),), {2.0: norms_P}, [1 / i], NUMPY)
        assert np.linalg.norm(norms_P * decision.coefs_P) == pytest.approx(1 / i, rel=1e-12)


def test_a_schedule_is_linear_between_its_points_and_flat_outside():
    points = ((10, 8.0), (20, 4.0), (40, 1.0))
    assert [limit_at(points, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [
        8.0, 8.0, 6.0, 4.0, 2.5, 1.0, 1.0,
    ]  # fmt: skip
