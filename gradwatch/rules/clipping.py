"""Norms in, multipliers out: the arithmetic of gradient clipping.

    norms {p: norms_P}, limits_K  ->  coefs_P, over_K

P tensors in parameter order, K rules in the order of the policy, one vector of norms for each
norm_type p that a rule uses. Scaling a tensor by c scales its norm by c, so a whole chain of rules
needs one vector of norms and gives one vector of multipliers: the gradient is read once for each p
and written at most once, whatever the chain. Only rules per unit and per element touch the data in
between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gradwatch.rules.arrays import Arrays, Vector

__all__ = [
    "LOSS",
    "NO_LOSS",
    "UPDATE",
    "WEIGHT",
    "Decision",
    "Limit",
    "Norms",
    "Rule",
    "Then",
    "Touch",
    "UnitSlice",
    "decide",
]

Then = Literal["scale", "skip", "zero", "stop", "warn"]
Norms = Mapping[float | str, Vector]
"""By norm_type the norm of each tensor [P]. Beside them, where a rule asks for it: `WEIGHT` and
`UPDATE` [P], the L2 norms of each weight and update; `LOSS` (0-d); and by the `key` of a rule per
unit the norm of each unit [U], by its `weight_key` those of its weights."""

LOSS, UPDATE, WEIGHT = "loss", "update", "weight"
NO_LOSS = -math.inf
"""Of a step for which none was logged: it is over no limit, and nothing is learned from it."""

Touch = Callable[["Rule", Vector, Vector], Norms]
"""Applies a rule per unit or element to the data: the rule, what each unit is multiplied by [U] or
the bound of each selected tensor's elements [S], and whether any exceeds its limit (0-d). Returns
the norms that there are then."""


@dataclass(frozen=True, slots=True)
class UnitSlice:
    """The output units of one tensor among those of a rule."""

    position: int
    """Of the tensor in the vector of norms."""

    first: int
    count: int
    axis: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One clip rule, its selection resolved to positions in the vector of norms."""

    name: str
    then: Then
    key: float | str = 2.0
    """Which norms are compared."""

    norm_type: float = 2.0
    """The p by which the norms of a unit's tensors combine."""

    per_element: bool = False
    """Whether each element is a unit of its own; `norm_type` is inf then."""

    slices: tuple[UnitSlice, ...] | None = None
    """The units of each present tensor, for a rule per unit."""

    root_size_U: Any = None
    """[U] or 0-d: what the L2 norm is divided by for the root mean square of a unit; None is 1."""

    floor: float = 0.0
    """Least weight norm that a norm is divided by; 0 where it is not."""

    eps: float = 0.0
    """Added to a unit's norm before the limit is divided by it."""

    tensors: Any = None
    """Positions of the selected tensors [S]; None selects all."""

    positions: tuple[int, ...] | None = None
    """The same on the host."""

    unit_of: Any = None
    """[S] which unit each selected tensor belongs to; None makes one unit of them all. For a rule
    per unit [U] the position of the tensor that each unit is of."""

    num_units: int = 1

    @property
    def weight_key(self) -> str:
        return WEIGHT if self.slices is None else f"{WEIGHT} of {self.key}"


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit for each unit of a rule, on the device of the norms."""

    value_U: Vector
    """inf where there is none."""

    goal: Callable[[Vector], Vector] | None = None
    """[U] norms of the units to what those over their limit are scaled to; None is the limit."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the chain says about one step. Everything is 0-d or [P], on the norms' device."""

    total_norm: Vector
    """L2 norm of all tensors as one vector, before the chain."""

    total_norm_clipped: Vector
    coefs_P: Vector
    """What each tensor is to be multiplied by."""

    kept_P: Vector
    """[P] its norm after the chain over its norm before, 1 where that is 0 or not finite; not the
    coef where a rule per element touched the tensor."""

    over: tuple[Vector, ...]
    """[K] each a 0-d truth value: some unit of that rule exceeded its limit."""

    units: tuple[Vector, ...]
    """[K] the raw measure of each unit of that rule."""

    compared: tuple[Vector, ...]
    """[K] what was compared with its limit: for a `scale` rule what those above had left."""


@np.errstate(all="ignore")  # a norm may be 0, inf or NaN, and what follows is provided for
def decide(
    rules: Sequence[Rule],
    norms: Norms,
    limits: Sequence[Any],
    xp: Arrays,
    *,
    zero_nonfinite: bool = False,
    touch: Touch | None = None,
) -> Decision:
    """Runs the chain from top to bottom; each `scale` rule sees what the ones above left.

    Other rules compare the raw norm, since behind a tight clip they would never fire, and a norm
    that is not finite counts as over their limit.

    Args:
        rules: K rules.
        norms: of each tensor and whatever else the rules compare, float32 or float64; 2.0 is
            always there.
        limits: K limits, floats, 0-d values of `xp` or `Limit`, all > 0.
        xp: the array library of the norms.
        zero_nonfinite: whether a tensor whose norm is not finite becomes 0 before the first rule.
        touch: applies rules per unit and element; needed where there is one that scales or zeroes.
    """
    raw_P = norms[2.0]
    coefs_P = xp.ones_like(raw_P)
    if zero_nonfinite:
        finite_P = xp.isfinite(raw_P)
        coefs_P = xp.where(finite_P, coefs_P, 0.0)
        units_of = {rule.key: rule.unit_of for rule in rules if rule.slices is not None}
        norms = {key: _finite_only(key, values, finite_P, units_of, xp)
                 for key, values in norms.items()}  # fmt: skip
    now, over, units, compared = norms, [], [], []
    changed = zero_nonfinite
    for rule, given in zip(rules, limits, strict=True):
        limit, to = (given.value_U, given.goal) if isinstance(given, Limit) else (given, None)
        units.append(_measured(rule, norms, norms[rule.key], xp))
        units_U = units[-1]
        if rule.then == "scale" and changed:
            units_U = _measured(rule, norms, _left_of(rule, now[rule.key], coefs_P, xp), xp)
        compared.append(units_U)
        if rule.then == "scale" and not rule.per_element:
            over.append((xp.isfinite(units_U) & (units_U > limit)).any())
        else:  # elements are clipped also beside one that is not finite
            over.append((~(units_U <= limit)).any())
        if rule.then not in ("scale", "zero"):
            continue
        changed = True
        if rule.slices is not None:
            assert touch is not None, "a rule per unit needs the data"
            if rule.then == "scale":
                kept_U = clip_coefs(units_U, limit, rule.eps, xp, to)
            else:
                kept_U = xp.where(units_U <= limit, xp.ones_like(units_U), 0.0)
            now = touch(rule, kept_U, over[-1])
        elif rule.per_element:
            assert touch is not None, "a rule per element needs the data"
            running_S = _selected(rule, coefs_P)
            divisor_S = running_S if rule.then == "scale" else xp.ones_like(running_S)
            now = touch(rule, xp.quotient(limit, divisor_S), over[-1])
        elif rule.then == "scale":
            coefs_U = clip_coefs(units_U, limit, rule.eps, xp, to)
            coefs_P = _scaled(rule, coefs_P, coefs_U, xp)
        else:
            kept_U = xp.where(units_U <= limit, xp.ones_like(units_U), 0.0)
            coefs_P = _scaled(rule, coefs_P, kept_U, xp)
    clipped_P = _left(now[2.0], coefs_P, xp)
    kept_P = coefs_P if now is norms else _ratio(clipped_P, raw_P, coefs_P, xp)
    return Decision(
        total_norm=xp.norm(raw_P),
        total_norm_clipped=xp.norm(clipped_P),
        coefs_P=coefs_P,
        kept_P=kept_P,
        over=tuple(over),
        units=tuple(units),
        compared=tuple(compared),
    )


def clip_coefs(
    norms_U: Vector,
    limit: Any,
    eps: float,
    xp: Arrays,
    to: Callable[[Vector], Vector] | None = None,
) -> Vector:
    """coef = min(1, limit / (norm + eps)), and 1 where the norm is not finite.

    A norm that is not finite says nothing about the length of the gradient; multiplying by
    limit / inf would turn infinities into NaN and everything else into 0.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013.
        arXiv:1211.5063. `eps` = 1e-6 is `torch.nn.utils.clip_grad_norm_`.
    """
    if to is None:
        coefs_U = xp.at_most_one(xp.quotient(limit, norms_U + eps))
    else:
        coefs_U = xp.at_most_one(xp.quotient(to(norms_U), norms_U + eps))
        coefs_U = xp.where(norms_U > limit, coefs_U, 1.0)
    return xp.where(xp.isfinite(norms_U), coefs_U, 1.0)


def _measured(rule: Rule, norms: Norms, values: Vector, xp: Arrays) -> Vector:
    """[U] the measure of each unit; of units per element the largest.

    Args:
        norms: where the norms of the weights are.
        values: the norms of tensors or of units that are measured.
    """
    if rule.key == LOSS:
        return values
    measured_U = _combined(rule, values, xp)
    if rule.floor:
        weights_U = _combined(rule, norms[rule.weight_key], xp)
        measured_U = measured_U / xp.where(weights_U > rule.floor, weights_U, rule.floor)
    return measured_U if rule.root_size_U is None else measured_U / rule.root_size_U


def _combined(rule: Rule, values: Vector, xp: Arrays) -> Vector:
    """[U] the norm of each unit from those of its tensors."""
    if rule.slices is not None:
        return values
    norms_S = _selected(rule, values)
    if rule.unit_of is None:
        return xp.norm(norms_S, rule.norm_type)
    return xp.segment_norm(norms_S, rule.unit_of, rule.num_units, rule.norm_type)


def _left_of(rule: Rule, values: Vector, coefs_P: Vector, xp: Arrays) -> Vector:
    """What is left of the norms that a rule compares."""
    return _left(values, coefs_P if rule.slices is None else coefs_P[rule.unit_of], xp)


def _finite_only(
    key: float | str, values: Vector, finite_P: Vector, units_of: Mapping[Any, Any], xp: Arrays
) -> Vector:
    """The norms without those of tensors that become 0."""
    if key in units_of:
        return xp.where(finite_P[units_of[key]], values, 0.0)
    is_of_gradients = key == UPDATE or not isinstance(key, str)
    return xp.where(finite_P, values, 0.0) if is_of_gradients else values


def _left(norms_P: Vector, coefs_P: Vector, xp: Arrays) -> Vector:
    """What is left of the norms; a coef of 0 leaves 0, also of what is not finite."""
    return xp.where(coefs_P > 0, norms_P, 0.0) * coefs_P


def _selected(rule: Rule, values_P: Vector) -> Vector:
    return values_P if rule.tensors is None else values_P[rule.tensors]


def _scaled(rule: Rule, coefs_P: Vector, coefs_U: Vector, xp: Arrays) -> Vector:
    coefs_S = coefs_U if rule.unit_of is None else coefs_U[rule.unit_of]
    if rule.tensors is None:
        return coefs_P * coefs_S
    return xp.scaled_at(coefs_P, rule.tensors, coefs_S)


def _ratio(after_P: Vector, before_P: Vector, coefs_P: Vector, xp: Arrays) -> Vector:
    """after / before, 1 where that says nothing; 0 where a rule has zeroed the tensor."""
    ratio_P = xp.quotient(after_P, before_P)
    ratio_P = xp.where(xp.isfinite(ratio_P), ratio_P, 1.0)
    return xp.where(coefs_P > 0, ratio_P, 0.0)
