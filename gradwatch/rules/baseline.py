"""Accepted values in, what would be abnormal out: the rolling baseline of every layer.

    y[L] = ln(norm)  ->  bound[L]: above it a value is abnormal;  calm[L]: below it one is not

For each layer, over its last `window` accepted values,

    center = median(y),   scale = max(1.4826 median(|y - center|), floor)
    bound  = center + max(z scale, ln times)

Median and MAD are refreshed after at most `REFRESH` records, for all layers together: doing one
layer after another would be smoother, but would make a finding depend on the order of layers.

A layer goes through these phases:

    blind    fewer than `EARLY` values: nothing is abnormal
    early    fewer than `warmup`: abnormal is `FAR` times the median
    young    fewer than `window`: `bound` is up to `YOUNG` times as high, since a network that
             begins to learn leaves the plateau that its first values come from
    settled  `bound` as above
    wary     for `warmup` values after a change that may rescale the norm by itself: abnormal is
             what is beyond `bound` and `FAR` times the median

After an announced change the window starts anew, and until it holds `warmup` values the baseline
from before goes on judging: a layer that has once been settled is never blind again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.records import Bools, Float64s, Indices

__all__ = ["EARLY", "FAR", "REFRESH", "Band", "Baseline", "band_of", "median_and_mad"]

EARLY = 8
"""Accepted values from which a median means something."""

FAR = 100.0
"""How many times the median is abnormal while little is known. Healthy runs whose batch shrank
16-fold went up to 70 times their median."""

YOUNG = 2.1
"""How many times further up a value must be while the window is not full, but no more than half as
far again in logarithms. Small healthy networks that left a plateau after some 70 steps went up to
5.7 times their median."""

REFRESH = 16
"""Records after which median and MAD are taken afresh; sooner while the run is young."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What makes a value abnormal; detectors with the same band share one baseline."""

    z: float
    times: float
    floor: float
    warmup: int
    window: int


def band_of(config: Any) -> Band:
    """Of a detector's section that has them all."""
    return Band(
        z=config.z,
        times=config.times,
        floor=config.floor,
        warmup=config.warmup,
        window=config.window,
    )


def median_and_mad(values_LW: Float64s) -> tuple[Float64s, Float64s]:
    """[L] median and 1.4826 x median absolute deviation of each row; no NaN."""
    center_L = _medians(values_LW)
    return center_L, 1.4826 * _medians(np.abs(values_LW - center_L[:, None]))


def _medians(values_LW: Float64s) -> Float64s:
    # NumPy sorts short rows with vector instructions: ten times faster than its partition.
    ordered = np.sort(values_LW, axis=1)
    width = ordered.shape[1]
    middle: Float64s = (ordered[:, (width - 1) // 2] + ordered[:, width // 2]) / 2
    return middle


class Baseline:
    """The windows of L layers. Its arrays are updated in place."""

    def __init__(self, num_layers: int, band: Band) -> None:
        self.center_L: Float64s = np.full(num_layers, np.nan)
        """ln of the median norm; NaN while a layer is blind."""

        self.bound_L: Float64s
        """Above it a value is abnormal; inf while a layer is blind."""

        self.wary_bound_L: Float64s
        """The same as if every layer were wary, for a record that is known to be odd."""

        self.low_L: Float64s
        """As far below the center as `bound_L` is above; -inf while a layer is not settled."""

        self.calm_L: Float64s
        """Below it a value counts towards the end of an episode: half way to `bound_L`."""

        self.calm_low_L: Float64s
        """The same of a low one: above it, half way to `low_L`."""

        self.median_L: Float64s
        """exp(center)."""

        self._band = band
        self._scale_L: Float64s = np.full(num_layers, band.floor)
        self._settled_L: Bools = np.zeros(num_layers, dtype=np.bool_)
        self._young_L: Bools = np.zeros(num_layers, dtype=np.bool_)
        self._wary_L: Indices = np.zeros(num_layers, dtype=np.intp)
        self._values_LW: Float64s = np.zeros((num_layers, band.window))
        self._taken_L: Indices = np.zeros(num_layers, dtype=np.intp)
        self._clock: Indices = np.zeros(2, dtype=np.intp)  # records, of them since the refresh
        self._everyone: Indices = np.arange(num_layers)
        self._set_bounds()

    def accept(self, y_L: Float64s, accepted_L: Bools | None = None) -> None:
        """Takes values in, winsorised at center + z scale; None accepts every layer's.

        Only from above: a fall is nothing that a baseline must be protected from, and one that
        followed it late would hide the next explosion.
        """
        rows = self._everyone if accepted_L is None else np.flatnonzero(accepted_L)
        values = np.minimum(y_L, self._cap_L)
        self._values_LW[rows, self._taken_L[rows] % self._band.window] = values[rows]
        self._taken_L[rows] += 1
        if self._any_wary:
            self._relax(rows)

    def end_record(self) -> None:
        """To be called once a record, after its values were judged and accepted."""
        self._clock += 1
        records, since_refresh = self._clock
        if since_refresh >= min(REFRESH, max(1, records // EARLY)):
            self.refresh()

    def refresh(self) -> None:
        """Takes median and MAD afresh, of the layers whose window holds enough values."""
        self._clock[1] = 0
        warmup = self._band.warmup
        held_L = np.minimum(self._taken_L, self._band.window)
        ready_L = held_L >= np.where(self._settled_L, warmup, min(EARLY, warmup))
        for held in set(held_L[ready_L].tolist()):
            rows = np.flatnonzero(ready_L & (held_L == held))
            everyone = len(rows) == len(held_L)
            values = self._values_LW[:, :held] if everyone else self._values_LW[rows, :held]
            center, mad = median_and_mad(values)
            self.center_L[rows] = center
            self._scale_L[rows] = np.maximum(mad, self._band.floor)
        self._settled_L |= held_L >= warmup
        # What is judged by the window from before a change is judged by a full one.
        renewed_L = held_L >= warmup
        self._young_L[renewed_L] = held_L[renewed_L] < self._band.window
        self._set_bounds()

    def begin_anew(self, *, wary: bool) -> None:
        """A new window for every layer, after an announced change.

        A window that is not full enough yet to stand for itself is kept, so that changes which
        come faster than the warm-up cannot tie a layer to an old baseline for ever.

        Args:
            wary: the change may rescale the norm by itself.
        """
        self.refresh()
        self._taken_L[self._settled_L & ~self.short_L()] = 0
        if wary:
            self._wary_L[:] = self._band.warmup
            self._set_bounds()

    def rebase(self, layers_L: Bools, y_L: Float64s) -> None:
        """Accepts the present values of some layers as their new centers, warily."""
        self.center_L[layers_L] = y_L[layers_L]
        self._scale_L[layers_L] = self._band.floor
        self._settled_L[layers_L] = True
        self._young_L[layers_L] = False
        self._taken_L[layers_L] = 0
        self._wary_L[layers_L] = self._band.warmup
        self._set_bounds()

    def short_L(self) -> Bools:
        """[L] whether a layer's window holds fewer values than the warm-up asks for."""
        return self._taken_L < self._band.warmup

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The state, live."""
        return {
            "center": self.center_L,
            "scale": self._scale_L,
            "settled": self._settled_L,
            "young": self._young_L,
            "wary": self._wary_L,
            "values": self._values_LW,
            "taken": self._taken_L,
            "clock": self._clock,
        }

    def restored(self) -> None:
        """To be called when `arrays` were written to."""
        self._set_bounds()

    def _relax(self, rows: Indices) -> None:
        """One value more; the last one of the warm-up ends the wariness, on the new window."""
        wary = rows[self._wary_L[rows] > 0]
        self._wary_L[wary] -= 1
        if not self._wary_L[wary].all():
            self.refresh()

    def _set_bounds(self) -> None:
        """Bounds follow from the arrays alone, so that a restored baseline has the same ones."""
        wary_L = self._wary_L > 0
        self._any_wary = bool(wary_L.any())
        trusted_L = self._settled_L & ~wary_L
        all_trusted = np.count_nonzero(trusted_L) == len(trusted_L)
        spread_L = within_L = self._band.z * self._scale_L
        usual_L = reach_L = np.maximum(spread_L, math.log(self._band.times))
        if np.count_nonzero(self._young_L):
            more_L = np.where(self._young_L, np.minimum(usual_L / 2, math.log(YOUNG)), 0)
            usual_L = reach_L = usual_L + more_L
        far_L = np.maximum(usual_L, math.log(FAR))
        center_L, low_L = self.center_L, self.center_L - usual_L
        if not all_trusted:
            far_L = np.where(self._settled_L, far_L, math.log(FAR))
            reach_L = np.where(trusted_L, usual_L, far_L)
            within_L = np.where(trusted_L, spread_L, far_L)
            low_L = np.where(trusted_L, low_L, -np.inf)
            center_L = np.where(np.isnan(center_L), np.inf, center_L)
        self.bound_L = center_L + reach_L
        self.wary_bound_L = center_L + far_L
        self.low_L = low_L
        self.calm_L = center_L + within_L / 2
        self.calm_low_L = self.center_L - (self.center_L - low_L) / 2
        self._cap_L = center_L + within_L
        self.median_L = np.exp(self.center_L)
