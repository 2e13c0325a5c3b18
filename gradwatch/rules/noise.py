"""How noisy gradients are, from the norms of a part of a batch and of the whole.

    |G|^2 = (B nB^2 - b nb^2) / (B - b)     S = (nb^2 - nB^2) / (1/b - 1/B)     B_simple = S / |G|^2

b samples have a gradient of norm nb, all B of them one of norm nB. Both estimates are unbiased and
far too noisy one by one; their averages are taken apart from each other and divided last. B_simple
is the batch size at which noise and signal are equal: with much less each step is mostly noise,
with much more most samples are wasted.

References:
    McCandlish et al., An Empirical Model of Large-Batch Training, 2018. arXiv:1812.06162,
    equations 2.8, A.1 and A.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NoiseScale"]

DECAY = 0.995
FAR = 100.0
"""Times what pure noise gives: norms that far apart are not of the same scale."""


@dataclass(slots=True)
class NoiseScale:
    """Averages over the steps that were measured."""

    count: int = 0
    signal: float = 0.0
    """Of |G|^2."""

    noise: float = 0.0
    """Of S, the trace of the covariance of the gradients of single samples."""

    def observe(self, part: float, part_weight: float, whole: float, weight: float) -> None:
        """Takes one step in; what cannot be used leaves it as it is.

        Args:
            part: norm of the gradient of the first micro-batch, unscaled and before any clipping.
            part_weight: its samples, or tokens, or 1.
            whole: norm of the gradient of the step.
            weight: of all its micro-batches, in the same unit.
        """
        usable = 0 < part_weight < weight and part > 0 and whole > 0
        if not (usable and math.isfinite(part) and math.isfinite(whole)):
            return
        squared_part, squared_whole = part * part, whole * whole
        if squared_part > FAR * squared_whole * weight / part_weight:
            return
        signal = (weight * squared_whole - part_weight * squared_part) / (weight - part_weight)
        noise = (squared_part - squared_whole) / (1 / part_weight - 1 / weight)
        self.count += 1
        keep = min(DECAY, 1 - 1 / self.count)
        self.signal = keep * self.signal + (1 - keep) * signal
        self.noise = keep * self.noise + (1 - keep) * noise

    @property
    def value(self) -> float:
        """B_simple in the unit of the weights; NaN while the averages say nothing."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "signal": self.signal, "noise": self.noise}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> NoiseScale:
        return cls(int(state["count"]), float(state["signal"]), float(state["noise"]))
