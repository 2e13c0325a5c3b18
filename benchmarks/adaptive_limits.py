"""What limits that learn do on healthy and on broken runs: false clips, spikes, new levels, NaN.

    python benchmarks/adaptive_limits.py [--traces 20]

Log-normal norms with sigma 0.1, a start-up transient of 3x over 40 steps and a drift of up to 1.5x.
Each rule is written as a policy would have it. For each:

* false clips: share of healthy steps behind the warm-up that are clipped or skipped
* spike: what a norm of 100 times the level becomes, over the level
* steps until a level that shifts by 1.5, 3 and 10 for good is no longer clipped
* after a NaN: whether later limits are what they are without it

The published rules that are "dead" after a NaN are so in their own implementations; here a norm
that is not finite is never learned from, whatever the rule.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from gradwatch.policy import StatisticLimit
from gradwatch.rules.arrays import NUMPY
from gradwatch.rules.statistics import begun, bounds, goal, learned

STEPS, SHIFTED = 2000, 1500
CALM = 5
"""Steps in a row that are not clipped: the new level is accepted."""

RULES = {
    "log z = 4, decay .99, winsorised": (StatisticLimit(z=4), "scale"),
    "ZClip": (
        StatisticLimit(
            z=2.5, space="raw", decay=0.97, warmup=25, learn="clipped", to="reciprocal", floor=0
        ),
        "scale",
    ),
    "AutoClip p10": (StatisticLimit(quantile=0.1, window="all", learn="raw", warmup=1), "scale"),
    "AdaGC 1.05 / .98": (StatisticLimit(ratio=1.05, decay=0.98, learn="clipped"), "scale"),
    "EMA ratio 2.0 (OLMo)": (StatisticLimit(ratio=2.0, learn="clipped"), "scale"),
    "skip at 6 sigma of 128 (OLMo-core)": (
        StatisticLimit(z=6, space="raw", window=128, warmup=64, learn="raw", floor=0),
        "skip",
    ),
}


def trace(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    step = np.arange(STEPS)
    transient = np.log(3.0) * np.maximum(0, 1 - step / 40)
    drift = np.log(1.5) * draw.uniform(-1, 1) * step / STEPS
    return np.exp(transient + drift + 0.1 * draw.standard_normal(STEPS))


class Rule:
    def __init__(self, statistic: StatisticLimit) -> None:
        self.statistic = statistic
        self.state = begun(statistic, 1, NUMPY)

    def see(self, norm: float) -> tuple[bool, float]:
        """Whether it is over its limit, and what it becomes."""
        with np.errstate(all="ignore"):
            found = bounds(self.statistic, self.state, NUMPY)
            norms = np.array([norm])
            becomes = goal(self.statistic, found, norms, NUMPY)[0]
            self.state = learned(self.statistic, self.state, found, norms, True, NUMPY)
        over = norm > found.limit_U[0]
        return bool(over), float(becomes if over else norm)


def played(statistic: StatisticLimit, norms: np.ndarray) -> tuple[list[bool], list[float]]:
    rule = Rule(statistic)
    seen = [rule.see(float(norm)) for norm in norms]
    return [over for over, _ in seen], [becomes for _, becomes in seen]


def row(name: str, traces: int) -> str:
    statistic, then = RULES[name]
    false, spikes = [], []
    recovered: dict[float, list[float]] = {1.5: [], 3.0: [], 10.0: []}
    alike = True
    for seed in range(traces):
        norms = trace(seed)
        over, _ = played(statistic, norms)
        false.append(np.mean(over[max(statistic.warmup, 50) :]))
        spiked = norms.copy()
        level = float(np.median(norms[SHIFTED - 100 : SHIFTED]))
        spiked[SHIFTED] = 100 * level
        over, becomes = played(statistic, spiked)
        spikes.append(math.nan if then == "skip" and over[SHIFTED] else becomes[SHIFTED] / level)
        for shift, steps in recovered.items():
            moved = norms.copy()
            moved[SHIFTED:] *= shift
            over, _ = played(statistic, moved)
            runs = np.convolve(over[SHIFTED:], np.ones(CALM), "valid")
            calm = np.flatnonzero(runs == 0)
            steps.append(float(calm[0]) if calm.size else math.inf)
        broken = np.insert(norms, SHIFTED, math.nan)
        after, _ = played(statistic, broken)
        plain, _ = played(statistic, norms)
        alike = alike and after[SHIFTED + 1 :] == plain[SHIFTED:]
    shifts = " / ".join(
        "never" if math.isinf(m) else f"{m:.0f}" for m in map(np.median, recovered.values())
    )
    spike = "skipped" if np.isnan(spikes).all() else f"{np.nanmedian(spikes):.2f}"
    nan = "unaffected" if alike else "changed"
    return f"{name:36} {np.mean(false):11.2%} {spike:>9} {shifts:>22}  {nan}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--traces", type=int, default=20)
    traces = arguments.parse_args().traces
    print(f"{traces} traces of {STEPS} steps")
    print(f"{'rule':36} {'false clips':>11} {'x100':>9} {'x1.5 / x3 / x10':>22}  after a NaN")
    for name in RULES:
        print(row(name, traces), flush=True)


if __name__ == "__main__":
    main()
