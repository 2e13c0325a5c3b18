"""Limits that follow the history of a norm.

    State, norms_U  ->  bounds (from before this step)  ->  State with this step learned

One state for each (rule, unit), as vectors over the U units of a rule, in float64. Everything is
arithmetic on whole vectors, so that it runs on NumPy and on a device, where no value is read. A
rule of one unit on the host runs the same lines on plain floats (`NUMBERS`), some ten times faster.

With a statistic z in log space, x = ln n, after t accepted values:

    s = max(floor, sqrt v)      limit = exp(mu + z s)      learned: clamp(x, mu - z s, mu + z s)
    a_t = min(decay, 1 - 1/t)   d = x - mu   mu += (1 - a_t) d   v = a_t (v + (1 - a_t) d^2)

The published rules are the other settings: ZClip (raw, arXiv:2504.02507), AdaGC (ratio,
arXiv:2502.11034), AutoClip (quantile, arXiv:2007.14469), SkipStep (raw with a window, OLMo-core).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradwatch.policy import StatisticLimit
from gradwatch.rules.arrays import Arrays, Vector

__all__ = ["Bounds", "State", "begun", "begun_again", "bounds", "goal", "learned"]

DECAY = 0.99
RESTART = 50
"""Accepted values that the warm-up leaves behind: where it ends, the state begins anew from their
median and MAD, so that a start-up transient does not linger."""

MAD = 1.4826
FIRST_ALL = 256
"""Room for a history of all values at first; it doubles when it is full."""


@dataclass(frozen=True, slots=True)
class State:
    """The history of U units."""

    count_U: Vector
    """Accepted values so far."""

    mu_U: Vector
    v_U: Vector
    """Mean and variance, of ln n or of n."""

    ring_UW: Vector
    """The last W accepted values, each unit's newest at (count - 1) % W; W may be 0."""

    until_U: Vector
    """The limit while warming up; inf where there is none."""

    def arrays(self) -> dict[str, Vector]:
        return {
            "count": self.count_U, "mu": self.mu_U, "v": self.v_U, "ring": self.ring_UW,
            "until": self.until_U,
        }  # fmt: skip

    @classmethod
    def of(cls, arrays: Mapping[str, Vector]) -> State:
        return cls(*(arrays[name] for name in ("count", "mu", "v", "ring", "until")))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a rule compares this step with. All [U]."""

    limit_U: Vector
    """inf where there is none yet."""

    mu_U: Vector
    sigma_U: Vector
    known_U: Vector
    """Whether the history is long enough, so that the limit comes from it."""


def begun(statistic: StatisticLimit, num_units: int, xp: Arrays) -> State:
    """A history of nothing."""
    zeros_U = xp.doubles(np.zeros(num_units))
    width = _ring_width(statistic)
    until = math.inf if statistic.until is None else statistic.until
    ring_UW = xp.ring(np.zeros((num_units, width)))
    return State(zeros_U, zeros_U, zeros_U, ring_UW, until + zeros_U)


def begun_again(
    statistic: StatisticLimit, state: State, found: Bounds, growth: float, xp: Arrays
) -> State:
    """A history of nothing, after a change by intention that may move the level of the norm.

    Until it is known again the limit is the one from before, times what the level may grow by.
    """
    fresh = begun(statistic, len(found.limit_U) if hasattr(found.limit_U, "__len__") else 1, xp)
    before_U = found.limit_U * max(1.0, growth)
    return replace(fresh, until_U=xp.lib.where(found.known_U, before_U, state.until_U))


def bounds(statistic: StatisticLimit, state: State, xp: Arrays, *, signed: bool = False) -> Bounds:
    """The limits of the step that is due; that step has no part in them.

    Args:
        signed: whether values may be below 0, as a loss may.
    """
    lib = xp.lib
    if statistic.window is not None and statistic.quantile is None:
        mu_U, v_U = xp.ring_moments(state.ring_UW, state.count_U)
    else:
        mu_U, v_U = state.mu_U, state.v_U
    sigma_U = lib.sqrt(v_U)
    if statistic.z is not None:
        least = statistic.floor if _in_logs(statistic) else statistic.floor * lib.abs(mu_U)
        sigma_U = lib.where(sigma_U > least, sigma_U, least + 0 * sigma_U)
        limit_U = mu_U + statistic.z * sigma_U
        limit_U = lib.exp(limit_U) if _in_logs(statistic) else limit_U
    elif statistic.ratio is not None:
        limit_U = statistic.ratio * mu_U
    else:
        assert statistic.quantile is not None
        limit_U = xp.ring_quantile(state.ring_UW, state.count_U, statistic.quantile)
    low = -math.inf if statistic.min is None else statistic.min
    high = math.inf if statistic.max is None else statistic.max
    limit_U = lib.clip(limit_U, low, high)
    # A window of nothing, or a history of zeros, is no limit.
    known_U = state.count_U >= max(statistic.warmup, 1)
    if not signed:
        known_U = known_U & (limit_U > 0)
    return Bounds(lib.where(known_U, limit_U, state.until_U), mu_U, sigma_U, known_U)


def goal(statistic: StatisticLimit, found: Bounds, norms_U: Vector, xp: Arrays) -> Vector:
    """[U] the norm that a unit over its limit is scaled to."""
    lib = xp.lib
    centre_U = lib.exp(found.mu_U) if _in_logs(statistic) else found.mu_U
    if statistic.to == "limit" or statistic.quantile is not None:
        return found.limit_U
    # Before the mean is known there is only the limit to go to.
    centre_U = lib.where(found.known_U, centre_U, found.limit_U)
    if statistic.to == "mean" or statistic.z is None:
        return _at_most(centre_U, found.limit_U, lib)
    # ZClip: the further out, the nearer to the mean.
    x_U = lib.log(norms_U) if _in_logs(statistic) else norms_U
    score_U = lib.divide(x_U - found.mu_U, found.sigma_U)
    x_U = found.mu_U + lib.divide(statistic.z**2 * found.sigma_U, score_U)
    nearer_U = _at_most(lib.exp(x_U) if _in_logs(statistic) else x_U, found.limit_U, lib)
    return lib.where(found.known_U, nearer_U, found.limit_U)


def learned(
    statistic: StatisticLimit,
    state: State,
    found: Bounds,
    norms_U: Vector,
    usable: Vector,
    xp: Arrays,
    *,
    signed: bool = False,
) -> State:
    """The history with this step; what is not finite or not above 0 leaves it as it is.

    Args:
        signed: whether values of 0 and below are taken as well; there is no logarithm of them.
        norms_U: raw, before any rule, in float64.
        usable: 0-d, whether the step may be learned from: its whole gradient is finite.
    """
    lib = xp.lib
    accept_U = usable & lib.isfinite(norms_U)
    if not signed or _in_logs(statistic):
        accept_U = accept_U & (norms_U > 0)
    over_U = norms_U > found.limit_U
    warm_U = state.count_U >= statistic.warmup
    taken_U = lib.where(accept_U, norms_U, 1.0 + 0 * state.count_U)
    if statistic.learn == "accepted":
        accept_U = lib.where(over_U, False, accept_U)
    elif statistic.learn == "clipped":
        taken_U = lib.where(over_U, goal(statistic, found, taken_U, xp), taken_U)
    x_U = lib.log(taken_U) if _in_logs(statistic) else taken_U
    if statistic.learn == "winsor":
        x_U = lib.where(warm_U, _winsorised(statistic, found, x_U, xp), x_U)
    count_U = state.count_U + accept_U
    mu_U, v_U = _moments(statistic, state, x_U, count_U, xp)
    after = State(
        count_U,
        lib.where(accept_U, mu_U, state.mu_U),
        lib.where(accept_U, v_U, state.v_U),
        xp.ring_pushed(
            state.ring_UW, state.count_U, x_U, accept_U, grows=statistic.window == "all"
        ),
        state.until_U,
    )
    return _restarted(statistic, state, after, xp)


def _moments(
    statistic: StatisticLimit, state: State, x_U: Vector, count_U: Vector, xp: Arrays
) -> tuple[Vector, Vector]:
    """Mean and variance with x; the first value is the mean and has no variance."""
    lib = xp.lib
    t_U = lib.where(count_U > 0, count_U, 1.0 + 0 * count_U)
    decay = DECAY if statistic.decay is None else statistic.decay
    d_U = x_U - state.mu_U
    if statistic.z is not None and not _in_logs(statistic):
        # As published: plain moments of the warm-up, then decay, each about the new mean.
        in_warmup_U = count_U <= statistic.warmup
        a_U = lib.where(in_warmup_U, 1 - 1 / t_U, decay + 0 * t_U)
        mu_U = state.mu_U + (1 - a_U) * d_U
        plain_U = a_U * (state.v_U + (1 - a_U) * d_U * d_U)
        v_U = a_U * state.v_U + (1 - a_U) * (x_U - mu_U) * (x_U - mu_U)
        return mu_U, lib.where(in_warmup_U, plain_U, v_U)
    a_U = _at_most(1 - 1 / t_U, decay + 0 * t_U, lib)
    return state.mu_U + (1 - a_U) * d_U, a_U * (state.v_U + (1 - a_U) * d_U * d_U)


def _restarted(statistic: StatisticLimit, before: State, after: State, xp: Arrays) -> State:
    """Where the warm-up has just ended: median and MAD of its last values."""
    if not _restarts(statistic) or statistic.warmup == 0:
        return after
    lib = xp.lib
    ends_U = (before.count_U < statistic.warmup) & (after.count_U >= statistic.warmup)
    if not xp.may_be_true(ends_U):
        return after
    median_U, mad_U = xp.ring_median_and_mad(after.ring_UW)
    return replace(
        after,
        mu_U=lib.where(ends_U, median_U, after.mu_U),
        v_U=lib.where(ends_U, (MAD * mad_U) ** 2, after.v_U),
    )


def _winsorised(statistic: StatisticLimit, found: Bounds, x_U: Vector, xp: Arrays) -> Vector:
    lib = xp.lib
    if statistic.z is None:
        return _at_most(x_U, found.limit_U, lib)
    low_U = found.mu_U - statistic.z * found.sigma_U
    high_U = found.mu_U + statistic.z * found.sigma_U
    return _at_most(lib.where(x_U < low_U, low_U, x_U), high_U, lib)


def _at_most(x: Vector, most: Vector, lib: Any) -> Vector:
    return lib.where(x > most, most, x)


def _in_logs(statistic: StatisticLimit) -> bool:
    """Only z looks at logarithms: a ratio is of plain means, and a quantile is the same of both."""
    return statistic.z is not None and statistic.space == "log"


def _restarts(statistic: StatisticLimit) -> bool:
    return _in_logs(statistic) and statistic.window is None


def _ring_width(statistic: StatisticLimit) -> int:
    if isinstance(statistic.window, int):
        return statistic.window
    if statistic.window == "all":
        return FIRST_ALL
    if statistic.quantile is not None:
        return 128
    return min(RESTART, statistic.warmup) if _restarts(statistic) else 0
