"""Kinds that need more than norms, judged in the steps that were sampled.

dead               zeros nearly everywhere in the gradient of a layer
stalled_update     norm(dW) / norm(W) next to nothing
oversized_update   norm(dW) / norm(W) near 1
underflow          elements that float16 makes zero at the present loss scale
swallowed_update   weights that a step leaves as they are, to the bit
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gradwatch.policy import Detect
from gradwatch.policy.detectors import (
    Dead,
    OversizedUpdate,
    StalledUpdate,
    SwallowedUpdate,
    Underflow,
)
from gradwatch.records import Bools, Float64s, Indices, Layout
from gradwatch.rules.detect_reading import Reading
from gradwatch.rules.persistent import Judgement

__all__ = ["SAMPLED", "Limited", "Lost", "dead", "oversized", "samples_every", "stalled",
           "swallowed"]  # fmt: skip

SAMPLED = ("dead", "stalled_update", "oversized_update", "underflow", "swallowed_update")
RESTING = 0.01
"""Of the highest learning rate so far: below it updates are meant to be small."""

CALM = 0.5
"""How far below the limit a layer must come to count towards the end of an episode."""

SPARSE = ("Embedding", "EmbeddingBag")
"""Modules whose gradient is zero wherever a row was not asked for."""

USUAL = 64
"""Samples that the median of a layer is taken from."""

Measure = Callable[[Reading], tuple[Float64s, Bools]]
"""[L] what is compared with the limit, and where it says something."""


def samples_every(detect: Detect) -> int:
    """Steps between two samples; 0 where nobody needs one."""
    return detect.every if any(detect[kind] is not None for kind in SAMPLED) else 0


class Limited:
    """A measure of each layer above, or below, a limit that is given."""

    def __init__(
        self, measure: Measure, limit: float, said: str, *, below: bool = False,
        moving: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            said: a clause with `{value}` and `{limit}`.
            below: whether less is worse.
            moving: whether it says something only while the learning rate is not at rest.
        """
        self._measure, self._limit, self._said = measure, limit, said
        self._below, self._moving = below, moving
        self._highest: Float64s = np.zeros(1)

    def judge(self, reading: Reading) -> Judgement | None:
        rate = reading.record.learning_rate
        if self._moving and math.isfinite(rate):
            self._highest[0] = max(self._highest[0], rate)
        if not reading.record.samples:
            return None
        if self._moving and rate <= RESTING * self._highest[0]:
            return None
        with np.errstate(all="ignore"):
            value_L, judged_L = self._measure(reading)
            judged_L = judged_L & ~np.isnan(value_L)
            limit = self._limit
            if self._below:
                hit_L, calm_L = value_L < limit, value_L > limit / CALM
            else:
                hit_L, calm_L = value_L > limit, value_L < _calm(limit)
        return Judgement(hit_L, calm_L, judged_L, value_L, np.full_like(value_L, limit))

    def learn(self, reading: Reading, open_S: Bools) -> None:
        """There is nothing to learn."""

    def begin_anew(self, *, rescales: bool) -> None:
        """Nothing to begin."""

    def said(self, subject: int, value: float, expected: float) -> str:
        return self._said.format(value=value, limit=expected)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"highest": self._highest}

    def restored(self) -> None:
        """Nothing follows from the arrays."""


def _calm(limit: float) -> float:
    """Of shares near 1 half of what is left to 1, else half of the limit."""
    return 1 - (1 - limit) / CALM if limit > 0.9 else limit * CALM


def dead(layout: Layout, config: Dead) -> Limited:
    of_layer = _Shares(layout)
    sparse_L = np.ones(len(layout.layers), dtype=np.bool_)
    for parameter, layer in zip(layout.parameters, layout.layer_of, strict=True):
        sparse_L[layer] &= parameter.module in SPARSE

    def measure(reading: Reading) -> tuple[Float64s, Bools]:
        return of_layer(reading, "zero_share"), ~sparse_L

    # A share can be 1 and no more: at the limit is beyond it.
    limit = math.nextafter(config.share, 0.0)
    return Limited(measure, limit, "{value:.3%} of its gradient is zero")


def stalled(config: StalledUpdate) -> Limited:
    said = "an update is {value:.2g} of the weights, less than {limit:.2g},"
    return Limited(_ratios, config.ratio, said, below=True, moving=True)


def oversized(config: OversizedUpdate) -> Limited:
    def measure(reading: Reading) -> tuple[Float64s, Bools]:
        ratio_L, judged_L = _ratios(reading)
        weight_L = reading.record.layout.layer_norms(reading.record.samples["weight_norm"])
        return ratio_L, judged_L & (weight_L > config.least)

    return Limited(measure, config.ratio, "an update is {value:.2g} of the weights,")


def swallowed(layout: Layout, config: SwallowedUpdate) -> Limited:
    of_layer = _Shares(layout)

    def measure(reading: Reading) -> tuple[Float64s, Bools]:
        share_L = of_layer(reading, "unchanged_share")
        return share_L, np.ones(len(share_L), dtype=np.bool_)

    said = "{value:.0%} of the weights that have a gradient are unchanged after a step,"
    return Limited(measure, config.share, said, moving=True)


def _ratios(reading: Reading) -> tuple[Float64s, Bools]:
    ratio_L = reading.record.update_ratios.astype(np.float64)
    return ratio_L, np.isfinite(ratio_L)


class _Shares:
    """The share of a layer from those of its tensors, by their sizes."""

    def __init__(self, layout: Layout) -> None:
        self._layer_of_P: Indices = layout.layer_of_P
        self._size_P: Float64s = np.array([p.num_elements for p in layout.parameters], dtype=float)
        self._num_layers = len(layout.layers)

    def __call__(self, reading: Reading, name: str) -> Float64s:
        share_P = reading.record.samples[name].astype(np.float64)
        weight_P = np.where(np.isnan(share_P), 0.0, self._size_P)
        of_all_L = np.bincount(self._layer_of_P, weight_P, minlength=self._num_layers)
        sums_L = np.bincount(
            self._layer_of_P, weight_P * np.nan_to_num(share_P), minlength=self._num_layers
        )
        share_L: Float64s = sums_L / of_all_L
        return share_L


class Lost:
    """The share that float16 makes zero, above the median of the layer."""

    def __init__(self, layout: Layout, config: Underflow) -> None:
        self._config = config
        self._of_layer = _Shares(layout)
        count = len(layout.layers)
        self._usual_LW: Float64s = np.full((count, USUAL), np.nan)
        self._taken_L: Indices = np.zeros(count, dtype=np.intp)
        self._center_L: Float64s = np.full(count, np.nan)
        self._share_L: Float64s = np.full(count, np.nan)

    def judge(self, reading: Reading) -> Judgement | None:
        self._share_L = np.full_like(self._center_L, np.nan)
        if not reading.record.samples:
            return None
        with np.errstate(all="ignore"):
            self._share_L = self._of_layer(reading, "flushed_share")
            excess_L = self._share_L - self._center_L
            judged_L = ~np.isnan(excess_L)
            limit = self._config.share
            return Judgement(
                excess_L > limit, excess_L < CALM * limit, judged_L, self._share_L, self._center_L
            )

    def learn(self, reading: Reading, open_S: Bools) -> None:
        known_L = ~np.isnan(self._share_L) & ~open_S
        if not np.count_nonzero(known_L):
            return
        # Not what is far above: half a window later it would be the median.
        with np.errstate(all="ignore"):
            known_L &= ~(self._share_L > self._center_L + self._config.share)
        rows = np.flatnonzero(known_L)
        self._usual_LW[rows, self._taken_L[rows] % USUAL] = self._share_L[rows]
        self._taken_L[rows] += 1
        ready = rows[self._taken_L[rows] >= self._config.warmup]
        if len(ready):
            self._center_L[ready] = np.nanmedian(self._usual_LW[ready], axis=1)

    def begin_anew(self, *, rescales: bool) -> None:
        """A share does not depend on the level."""

    def said(self, subject: int, value: float, expected: float) -> str:
        return (
            f"{value:.0%} of its gradient is zero or too small for float16 at this loss scale, "
            f"where its median is {expected:.0%},"
        )

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"usual": self._usual_LW, "taken": self._taken_L, "center": self._center_L}

    def restored(self) -> None:
        """Nothing follows from the arrays."""
