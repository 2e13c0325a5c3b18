"""Norms in, multipliers out: the arithmetic of gradient clipping.

    norms {p: norms_P}, limits_K  ->  coefs_P, over_K

P tensors in parameter order, K rules in the order of the policy, one vector of norms for each
norm_type p that a rule uses. Scaling a tensor by c scales its
norm by c, so a whole chain of rules needs one vector of norms and gives one vector of multipliers:
the gradient is read once for each p and written at most once, whatever the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradwatch.rules.arrays import Arrays, Vector

__all__ = ["Decision", "Rule", "Then", "decide"]

Then = Literal["scale", "skip", "zero", "stop", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One clip rule, its selection resolved to positions in the vector of norms."""

    name: str
    then: Then
    norm_type: float = 2.0
    """The p of the p-norm that is compared."""

    root_size_U: Any = None
    """[U] or 0-d: what the L2 norm is divided by for the root mean square of a unit; None is 1."""

    eps: float = 0.0
    """Added to a unit's norm before the limit is divided by it."""

    tensors: Any = None
    """Positions of the selected tensors [S]; None selects all."""

    unit_of: Any = None
    """[S] which unit each selected tensor belongs to; None makes one unit of them all."""

    num_units: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """What the chain says about one step. Everything is 0-d or [P], on the norms' device."""

    total_norm: Vector
    """L2 norm of all tensors as one vector, before the chain."""

    total_norm_clipped: Vector
    coefs_P: Vector
    over: tuple[Vector, ...]
    """[K] each a 0-d truth value: some unit of that rule exceeded its limit."""


def decide(
    rules: Sequence[Rule], norms: Mapping[float, Vector], limits: Sequence[Any], xp: Arrays
) -> Decision:
    """Runs the chain from top to bottom; each `scale` rule sees what the ones above left.

    Rules that do not scale compare the raw norm, since behind a tight clip they would never fire,
    and a norm that is not finite counts as over their limit.

    Args:
        rules: K rules.
        norms: by norm_type the norm of each tensor [P], float32 or float64; 2.0 is always there.
        limits: K limits, floats or 0-d values of `xp`, all > 0.
        xp: the array library of the norms.
    """
    total_P = norms[2.0]
    coefs_P = xp.ones_like(total_P)
    over = []
    for rule, limit in zip(rules, limits, strict=True):
        norms_P = norms[rule.norm_type]
        units_U = _measured(rule, norms_P * coefs_P if rule.then == "scale" else norms_P, xp)
        if rule.then == "scale":
            over.append((xp.isfinite(units_U) & (units_U > limit)).any())
            coefs_P = _scaled(rule, coefs_P, clip_coefs(units_U, limit, rule.eps, xp), xp)
        else:
            over.append((~(units_U <= limit)).any())
    return Decision(xp.norm(total_P), xp.norm(total_P * coefs_P), coefs_P, tuple(over))


def clip_coefs(norms_U: Vector, limit: Any, eps: float, xp: Arrays) -> Vector:
    """coef = min(1, limit / (norm + eps)), and 1 where the norm is not finite.

    A norm that is not finite says nothing about the length of the gradient; multiplying by
    limit / inf would turn infinities into NaN and everything else into 0.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013.
        arXiv:1211.5063. `eps` = 1e-6 is `torch.nn.utils.clip_grad_norm_`.
    """
    coefs_U = xp.at_most_one(xp.quotient(limit, norms_U + eps))
    return xp.where(xp.isfinite(norms_U), coefs_U, 1.0)


def _measured(rule: Rule, norms_P: Vector, xp: Arrays) -> Vector:
    """[U] the measure of each unit."""
    norms_S = norms_P if rule.tensors is None else norms_P[rule.tensors]
    if rule.unit_of is None:
        measured_U = xp.norm(norms_S, rule.norm_type)
    else:
        measured_U = xp.segment_norm(norms_S, rule.unit_of, rule.num_units, rule.norm_type)
    return measured_U if rule.root_size_U is None else measured_U / rule.root_size_U


def _scaled(rule: Rule, coefs_P: Vector, coefs_U: Vector, xp: Arrays) -> Vector:
    coefs_S = coefs_U if rule.unit_of is None else coefs_U[rule.unit_of]
    if rule.tensors is None:
        return coefs_P * coefs_S
    return xp.scaled_at(coefs_P, rule.tensors, coefs_S)
