"""Rows as they come in, a grid of the whole run out, of bounded size however long the run is.

With it goes the baseline of each layer, by which a picture tells an odd norm from a large one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from gradwatch.page.grid import LEARNING, Grid, Indices, columns_for, grid_of, joined, with_usual
from gradwatch.page.reading import Rows
from gradwatch.records import Float32s, Float64s

__all__ = ["Overview"]

LEAST_WIDTH = 16
MOST_BYTES = 64 * 2**20
MOST_COLUMNS, FEWEST_COLUMNS = 4096, 256
FRESH = 1024
"""Columns that are gathered before they are joined to the others."""

MEMORY_STEPS = 256.0
"""By which a baseline forgets."""

WINSOR = 0.5
"""Decades that a column may move the baseline by at most; what is as far above it does not enter
before it has lasted."""

LASTING = 2000
"""Steps after which it does, as the detectors have it: an explosion does not become the norm."""

SAMPLED = 4
"""One step in so many has a part in the baseline."""


class Overview:
    """The whole of a run in a few thousand columns."""

    def __init__(self, num_layers: int) -> None:
        fitting = MOST_BYTES // (8 * max(num_layers, 1))
        self._most = min(max(fitting, FEWEST_COLUMNS), MOST_COLUMNS)
        self._grids: list[Grid] = []
        self._width = LEAST_WIDTH
        self._baseline = Baseline(num_layers, self._width)
        self.first = self.last = 0
        """Steps, of all that were added."""

    @property
    def width(self) -> int:
        return self._width

    def expect(self, first: int, last: int) -> None:
        """Says before the first rows which steps will come, which saves making columns wider."""
        if not self._grids:
            self._widen(columns_for(last - first + 1, self._most, self._width))

    def add(self, rows: Rows) -> None:
        if not len(rows.steps_N):
            return
        low, high = int(rows.steps_N.min()), int(rows.steps_N.max())
        if self._grids:
            low, high = min(low, self.first), max(high, self.last)
        self.first, self.last = low, high
        self._widen(columns_for(high - low + 1, self._most, self._width))
        grid = grid_of(rows, self._width)
        usual_CL = self._baseline.usual(rows, grid.index_C)
        self._grids.append(with_usual(grid, usual_CL))
        if sum(len(grid.index_C) for grid in self._grids[1:]) > FRESH:
            self._grids = [joined(self._grids)]

    def grid(self) -> Grid | None:
        """All columns so far; None before the first step."""
        if len(self._grids) > 1:
            self._grids = [joined(self._grids)]
        return self._grids[0] if self._grids else None

    def usual(self, rows: Rows) -> Float32s | None:
        """The baseline in each of some steps that were added before."""
        grid = self.grid()
        if grid is None:
            return None
        places = np.searchsorted(grid.index_C, rows.steps_N // grid.width, side="right") - 1
        return grid.usual_CL[np.clip(places, 0, None)]

    def _widen(self, width: int) -> None:
        if width == self._width:
            return
        self._grids = [grid.widened(width // self._width) for grid in self._grids]
        self._width = width
        self._baseline.set_width(width)


class Baseline:
    """For each layer log10 of its usual norm: a moving mean over columns, each with its own mean
    logarithm, in which no column moves it far; it begins with the median of the first ones."""

    def __init__(self, num_layers: int, width: int) -> None:
        self._usual_L: Float64s = np.full(num_layers, np.nan)
        self._seen_L: Float64s = np.zeros(num_layers)
        self._early_KL: Float64s = np.full((LEARNING // LEAST_WIDTH, num_layers), np.nan)
        self._above_L: Float64s = np.zeros(num_layers)
        """Steps for which a layer has been far above."""

        self._sum_L: Float64s = np.zeros(num_layers)
        self._count_L: Float64s = np.zeros(num_layers)
        self._is_known = False
        self._index: int | None = None
        self._width = width

    def set_width(self, width: int) -> None:
        if self._index is not None:
            self._index = self._index * self._width // width
        self._width = width

    def usual(self, rows: Rows, index_C: Indices) -> Float32s:
        """[C, L] what was usual when each column began.

        Args:
            index_C: the columns of the rows.
        """
        usual_CL = np.empty((len(index_C), rows.norms_NL.shape[1]), dtype=np.float32)
        sums_CL, counts_CL = self._logarithms(rows, index_C)
        for i, index in enumerate(index_C):
            if self._index is not None and index != self._index:
                self._close()
            self._index = int(index)
            self._sum_L += sums_CL[i]
            self._count_L += counts_CL[i]
            usual_CL[i] = self._usual_L
            if not self._is_known:
                usual_CL[i] = np.where(self._seen_L > 0, self._usual_L, self._mean())
        return usual_CL

    def _logarithms(self, rows: Rows, index_C: Indices) -> tuple[Float32s, Float32s]:
        """Sums and counts by column."""
        chosen = np.flatnonzero(rows.steps_N % SAMPLED == 0)
        columns = np.searchsorted(index_C, rows.steps_N[chosen] // self._width)
        order = np.argsort(columns, kind="stable")
        chosen, columns = chosen[order], columns[order]
        norms = rows.norms_NL[chosen]
        usable = np.isfinite(norms) & (norms > 0)
        logs = np.log10(np.where(usable, norms, np.float32(1)))
        shape = (len(index_C), norms.shape[1])
        sums, counts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        begin = np.flatnonzero(np.diff(columns, prepend=-1))
        for start, end in pairwise([*begin, len(chosen)]):
            logs[start:end].sum(axis=0, out=sums[columns[start]])
            usable[start:end].sum(axis=0, dtype=np.float32, out=counts[columns[start]])
        return sums, counts

    def _mean(self) -> Float64s:
        known = self._count_L > 0
        nothing = np.full_like(self._sum_L, np.nan)
        return np.divide(self._sum_L, self._count_L, out=nothing, where=known)

    def _close(self) -> None:
        known = self._count_L > 0
        mean_L = self._mean()
        is_early = known & (self._seen_L * self._width < LEARNING)
        share = np.maximum(1 - math.exp(-self._width / MEMORY_STEPS), 1 / (self._seen_L + 1))
        away_L = mean_L - self._usual_L
        is_above = (away_L > WINSOR) & ~is_early
        self._above_L = np.where(is_above, self._above_L + self._width, 0)
        is_barred = is_above & (self._above_L < LASTING)
        moved = np.where(is_barred, 0, np.clip(away_L, -WINSOR, WINSOR))
        later = np.where(self._seen_L > 0, self._usual_L + share * moved, mean_L)
        self._usual_L = np.where(known, later, self._usual_L)
        self._seen_L += known
        self._learn(np.flatnonzero(is_early), mean_L)
        self._is_known = self._is_known or bool((self._seen_L > 0).all())
        self._sum_L[:] = self._count_L[:] = 0

    def _learn(self, layers: Indices, mean_L: Float64s) -> None:
        """While a run starts, its norms go anywhere: the median so far is usual."""
        if len(layers):
            self._early_KL[self._seen_L[layers].astype(np.int64) - 1, layers] = mean_L[layers]
            self._usual_L[layers] = np.nanmedian(self._early_KL[:, layers], axis=0)
