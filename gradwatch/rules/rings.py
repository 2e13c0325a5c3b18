"""The last W values of U units, [U, W]: what a windowed statistic is made of.

Each unit's newest value is at (count - 1) % W, where `count_U` counts what it has taken.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

__all__ = ["NumberRings", "Rings"]


class Rings:
    """For a library of arrays; a mixin that needs its `lib`, `doubles`, `sorted`, `may_be_true`."""

    lib: Any
    doubles: Any
    sorted: Any
    may_be_true: Any

    def ring(self, values: Any) -> Any:
        """From NumPy [U, W]."""
        return self.doubles(values)

    def ring_pushed(
        self, ring_UW: Any, count_U: Any, x_U: Any, accept_U: Any, *, grows: bool
    ) -> Any:
        """A ring with x where it is accepted; one that grows is doubled before it would forget."""
        width = ring_UW.shape[-1]
        if width == 0:
            return ring_UW
        if grows and self.may_be_true(count_U >= width):
            ring_UW, width = self.lib.concatenate([ring_UW, 0 * ring_UW], -1), 2 * width
        here_UW = (self._columns(width) == (count_U % width)[:, None]) & accept_U[:, None]
        return self.lib.where(here_UW, x_U[:, None], ring_UW)

    def ring_moments(self, ring_UW: Any, count_U: Any) -> tuple[Any, Any]:
        """Mean and unbiased variance of what the ring holds, taken anew from all of it: a running
        sum would keep the rounding of every value that ever passed through."""
        width = ring_UW.shape[-1]
        filled_UW = self._columns(width) < count_U[:, None]
        n_U = self.lib.clip(count_U, 1, width)
        mu_U = (ring_UW * filled_UW).sum(-1) / n_U
        squares_UW = (ring_UW - mu_U[:, None]) ** 2 * filled_UW
        return mu_U, squares_UW.sum(-1) / self.lib.clip(n_U - 1, 1, width)

    def ring_quantile(self, ring_UW: Any, count_U: Any, quantile: float) -> Any:
        """Linear between the two nearest of what the ring holds, as `numpy.percentile`."""
        width = ring_UW.shape[-1]
        columns = self._columns(width)
        filled_UW = columns < count_U[:, None]
        sorted_UW = self.sorted(self.lib.where(filled_UW, ring_UW, math.inf + 0 * ring_UW))
        n_U = self.lib.clip(count_U, 1, width)
        at_U = quantile * (n_U - 1)
        low_U = self.lib.floor(at_U)
        high_U = self.lib.where(low_U + 1 > n_U - 1, n_U - 1, low_U + 1)
        low, high = (
            self.lib.where(columns == picked_U[:, None], sorted_UW, 0 * columns).sum(-1)
            for picked_U in (low_U, high_U)
        )
        return low + (high - low) * (at_U - low_U)

    def ring_median_and_mad(self, ring_UW: Any) -> tuple[Any, Any]:
        """Of a full ring: the median, and the median distance from it."""
        median_U = self._median(ring_UW)
        return median_U, self._median(self.lib.abs(ring_UW - median_U[:, None]))

    def _median(self, values_UW: Any) -> Any:
        sorted_UW, width = self.sorted(values_UW), values_UW.shape[-1]
        return (sorted_UW[:, (width - 1) // 2] + sorted_UW[:, width // 2]) / 2

    def _columns(self, width: int) -> Any:
        return self.doubles(np.arange(width))[None, :]


class NumberRings:
    """For one unit on the host: a ring is a list, which is copied when it changes."""

    def ring(self, values: Any) -> list[float]:
        """From NumPy [1, W]."""
        return [float(value) for value in values[0]]

    def ring_pushed(
        self, ring: list[float], count: float, x: float, accept: bool, *, grows: bool
    ) -> list[float]:
        if not accept or not ring:
            return ring
        full = grows and count >= len(ring)
        ring = ring + [0.0] * len(ring) if full else ring.copy()
        ring[int(count) % len(ring)] = x
        return ring

    def ring_moments(self, ring: list[float], count: float) -> tuple[float, float]:
        held = np.array(ring[: int(min(count, len(ring)))] or [0.0])
        mean = float(held.sum()) / len(held)
        held -= mean
        return mean, float(held.dot(held)) / max(1, len(held) - 1)

    def ring_quantile(self, ring: list[float], count: float, quantile: float) -> float:
        held = ring[: int(min(count, len(ring)))]
        return float(np.quantile(held, quantile)) if held else math.nan

    def ring_median_and_mad(self, ring: list[float]) -> tuple[float, float]:
        median = statistics.median(ring)
        return median, statistics.median(abs(value - median) for value in ring)
