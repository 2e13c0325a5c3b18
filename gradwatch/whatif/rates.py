"""How often something happens, from few trials: bounds that hold with 95 % confidence."""

from __future__ import annotations

from math import exp, lgamma, log, log1p

__all__ = ["upper_bound", "upper_rate"]

DOUBT = 0.05


def upper_bound(hits: int, trials: int) -> float:
    """Clopper and Pearson's one-sided bound of a probability; 1 without a trial."""
    if hits >= trials:
        return 1.0
    low, high = hits / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        under = sum(exp(_log_chance(k, trials, middle)) for k in range(hits + 1))
        low, high = (middle, high) if under > DOUBT else (low, middle)
    return high


def _log_chance(hits: int, trials: int, share: float) -> float:
    """Of so many hits, by the binomial distribution; its numbers are too large otherwise."""
    ways = lgamma(trials + 1) - lgamma(hits + 1) - lgamma(trials - hits + 1)
    return ways + hits * log(share) + (trials - hits) * log1p(-share)


def upper_rate(steps: int) -> float:
    """Of something that did not happen in so many steps, per step: 3 over their number."""
    return -log(DOUBT) / steps if steps else float("inf")
