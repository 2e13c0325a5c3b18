"""`loss_spike` and `diverging`: what the loss says that was logged for the step.

A step without one, or with one that is not finite, is passed over. A loss of 0 or below has no
logarithm, so that nothing is said of a run whose loss goes there.

References:
    Chowdhery et al., PaLM, 2022. arXiv:2204.02311, on spikes of the loss.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import Diverging as DivergingConfig
from gradwatch.policy.detectors import LossSpike as LossSpikeConfig
from gradwatch.records import Bools, Float64s, Indices
from gradwatch.rules.baseline import Baseline, band_of
from gradwatch.rules.detect_reading import Reading
from gradwatch.rules.detect_regime import JUMP
from gradwatch.rules.persistent import ALL, Judgement

__all__ = ["Diverging", "LossSpike", "loss_of"]

FIRST = 10
"""Losses whose median is where a run began."""


def loss_of(reading: Reading) -> float | None:
    """The loss of the step, where it has one with a logarithm."""
    loss = reading.record.scalars.get("loss", math.nan)
    return loss if 0 < loss < math.inf else None


class LossSpike:
    """ln(loss) above its own baseline, which a raised learning rate makes wary: the loss may rise
    with it, and what is usual is learnt anew."""

    def __init__(self, config: LossSpikeConfig) -> None:
        self._baseline = Baseline(1, band_of(config))
        self._rate: Float64s = np.full(1, math.nan)

    def judge(self, reading: Reading) -> Judgement | None:
        loss = loss_of(reading)
        if loss is None:
            return None
        y = np.array([math.log(loss)])
        baseline = self._baseline
        hit, calm = y > baseline.bound_L, y < baseline.calm_L
        return Judgement(hit, calm, ALL, np.array([loss]), baseline.median_L)

    def learn(self, reading: Reading, open_S: Bools) -> None:
        self._note_rate(reading.record.learning_rate)
        loss = loss_of(reading)
        if loss is not None and not open_S[0]:
            self._baseline.accept(np.array([math.log(loss)]))
            self._baseline.end_record()

    def _note_rate(self, rate: float) -> None:
        if rate > JUMP * self._rate[0]:
            self._baseline.begin_anew(wary=True)
        if math.isfinite(rate) and rate > 0:
            self._rate[0] = rate

    def begin_anew(self, *, rescales: bool) -> None:
        """The loss is that of the same weights, whatever the step is made of."""
        self._baseline.begin_anew(wary=False)

    def said(self, subject: int, value: float, expected: float) -> str:
        return f"the loss {value:.4g} is {value / expected:.3g}x its median {expected:.4g}"

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {**self._baseline.arrays(), "rate": self._rate}

    def restored(self) -> None:
        self._baseline.restored()


class Diverging:
    """The median of the last losses against the best one there has been."""

    def __init__(self, config: DivergingConfig) -> None:
        self._config = config
        self._losses: Float64s = np.full(config.over, math.nan)
        self._first: Float64s = np.full(FIRST, math.nan)
        self._count: Indices = np.zeros(1, dtype=np.intp)
        self._best: Float64s = np.full(1, math.inf)
        self._median = math.nan

    def judge(self, reading: Reading) -> Judgement | None:
        loss = loss_of(reading)
        if loss is None:
            return None
        config, count = self._config, int(self._count[0])
        self._losses[count % config.over] = loss
        if count < FIRST:
            self._first[count] = loss
        self._count[0] = count + 1
        if count + 1 < config.over:
            return None
        ordered = np.sort(self._losses)
        median = float(ordered[(config.over - 1) // 2] + ordered[config.over // 2]) / 2
        best = float(self._best[0])
        self._best[0] = min(best, median)
        away = median > config.times * best and median > config.share * self._begun(count + 1)
        hit = np.array([away and count + 1 >= config.after])
        return Judgement(hit, np.array([not away]), ALL, np.array([median]), np.array([best]))

    def _begun(self, count: int) -> float:
        """The median of the first losses, of so many in all."""
        return float(np.median(self._first[: min(FIRST, count)]))

    def learn(self, reading: Reading, open_S: Bools) -> None:
        """Everything was taken in when it was judged: the best is never that of an episode."""

    def begin_anew(self, *, rescales: bool) -> None:
        """The best loss is the best, whatever has changed since."""

    def said(self, subject: int, value: float, expected: float) -> str:
        return (
            f"the median of {self._config.over} losses, {value:.4g}, is {value / expected:.3g}x "
            f"the best one, {expected:.4g}"
        )

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {
            "losses": self._losses,
            "first": self._first,
            "count": self._count,
            "best": self._best,
        }

    def restored(self) -> None:
        """Nothing follows from the arrays."""
