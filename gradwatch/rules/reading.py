"""One decided step as the host reads it, and as one vector on its way there.

Decision, norms  ->  pack: one vector on the device  ->  unpack: Reading
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradwatch.records import Float32s
from gradwatch.rules.arrays import Arrays, Vector
from gradwatch.rules.clipping import Decision, Limit, Norms, Rule

__all__ = ["Reading", "compared", "least", "overflowed", "pack", "unapplied", "unpack"]

PLAIN = 6
"""Numbers that come first: both total norms, the loss scale, whether a scaler drops the step, the
norm of the first micro-batch, and whether a finding of any process ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the host knows of one step. Q of the P watched parameters have a gradient."""

    total_norm: float
    total_norm_clipped: float
    over: tuple[bool, ...]
    """[K] which rules were over their limit."""

    limits: tuple[float, ...]
    """[K] the limits of this step; of several units the least."""

    norms_Q: Float32s
    kept_Q: Float32s
    """The norm of each tensor after the chain over its norm before."""

    measures: tuple[Float32s, ...] = ()
    """[M] what the rules compared beside the L2 norm, of each tensor [Q]."""

    loss_scale: float = math.nan
    """What the gradients were still multiplied by; NaN where they were not."""

    overflow: bool = False
    """Whether a loss scaler drops the step."""

    first_norm: float = math.nan
    """Of the first micro-batch, still multiplied by the loss scale; NaN where not measured."""

    stopping: bool = False
    """Whether a finding of any of several processes is to end the run."""


def overflowed(limits: Sequence[float | Limit]) -> Reading:
    """A step that a loss scaler dropped before anybody saw its gradients."""
    return Reading(
        limits=tuple(math.nan if isinstance(one, Limit) else one for one in limits),
        total_norm=math.inf,
        total_norm_clipped=math.inf,
        over=(False,) * len(limits),
        norms_Q=np.empty(0, dtype=np.float32),
        kept_Q=np.empty(0, dtype=np.float32),
        overflow=True,
    )


def unapplied(reading: Reading) -> Reading:
    """The same step where nothing came of the decision."""
    return replace(
        reading, total_norm_clipped=reading.total_norm, kept_Q=np.ones_like(reading.kept_Q)
    )


def least(limit: float | Limit) -> Any:
    """One number for a limit: a float, or 0-d."""
    if not isinstance(limit, Limit):
        return limit
    return limit.value_U if isinstance(limit.value_U, float) else limit.value_U.min()


@np.errstate(invalid="ignore")
def compared(
    names: Sequence[str], rules: Sequence[Rule], norms: Norms, decision: Decision, xp: Arrays
) -> list[Vector]:
    """What the rules compared of each tensor [Q], by the names of `RunInfo.measures`: a norm as it
    is, and of the units of a tensor the largest measure."""
    by_rule = {f"unit:{rule.name}": k for k, rule in enumerate(rules)}
    found = []
    for name in names:
        if name in by_rule:
            rule, units_U = rules[by_rule[name]], decision.units[by_rule[name]]
            if rule.then == "scale":  # which is not about units that are not finite
                units_U = xp.where(xp.isfinite(units_U), units_U, 0.0)
            found.append(xp.segment_norm(units_U, rule.unit_of, len(norms[2.0]), math.inf))
        else:
            found.append(norms[name if name in norms else float(name.removeprefix("l"))])
    return found


def pack(
    decision: Decision,
    limits: Sequence[float | Limit],
    norms_Q: Vector,
    scale: Any,
    found_inf: Any,
    xp: Arrays,
    measures: Sequence[Vector] = (),
    first_norm: Any = None,
    stopping: Any = None,
) -> Vector:
    """All of a reading as one vector, without reading the device; None for what there is not."""
    plain = [decision.total_norm, decision.total_norm_clipped]
    plain += [xp.full_like(plain[0], math.nan) if scale is None else scale]
    plain += [xp.full_like(plain[0], 0.0) if found_inf is None else found_inf]
    plain += [xp.full_like(plain[0], math.nan) if first_norm is None else first_norm]
    plain += [xp.full_like(plain[0], 0.0) if stopping is None else stopping]
    numbers = [
        least(limit) if isinstance(limit, Limit) else xp.full_like(plain[0], limit)
        for limit in limits
    ]
    return xp.concat([*plain, *decision.over, *numbers, norms_Q, decision.kept_P, *measures])


def unpack(vector: Any, num_rules: int, num_measures: int = 0) -> Reading:
    """The reading that was packed into a vector, which is on the host now."""
    total_norm, total_norm_clipped, scale, found_inf, first, stopping = (
        float(x) for x in vector[:PLAIN]
    )
    behind = PLAIN + 2 * num_rules
    norms_Q, kept_Q, *measures = np.asarray(vector[behind:], dtype=np.float32).reshape(
        2 + num_measures, -1
    )
    return Reading(
        total_norm=total_norm,
        total_norm_clipped=total_norm_clipped,
        over=tuple(bool(x) for x in vector[PLAIN : PLAIN + num_rules]),
        limits=tuple(float(x) for x in vector[PLAIN + num_rules : behind]),
        norms_Q=norms_Q,
        kept_Q=kept_Q,
        measures=tuple(measures),
        loss_scale=scale,
        overflow=found_inf != 0,
        first_norm=first,
        stopping=stopping != 0,
    )
