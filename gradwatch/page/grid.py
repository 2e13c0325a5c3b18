"""Steps to columns of equal width, each with the largest norm in it: a spike of one step stays.

    Rows, width  ->  Grid  ->  a coarser Grid, the same as from the rows

Columns lie at multiples of their width, so that they do not move when a picture is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.page.reading import Rows
from gradwatch.records import Float32s, Float64s

__all__ = ["LEARNING", "Grid", "Indices", "columns_for", "grid_of", "joined", "with_usual"]

Indices = npt.NDArray[np.int64]

# Rounded up by what is worth seeing: a maximum of norms, a minimum of multipliers and scales.
HOW: dict[str, np.ufunc] = {
    "total_norm": np.fmax,
    "total_norm_clipped": np.fmax,
    "loss": np.fmax,
    "clip_coef": np.fmin,
    "clipped": np.add,
    "skipped": np.add,
    "micro_batches": np.fmax,
    "loss_scale": np.fmin,
    "learning_rate": np.fmax,
    "noise_scale": np.fmax,
    "local_norm": np.fmax,
    "duration_seconds": np.fmax,
    "time": np.fmax,
    "count": np.add,
}


LEARNING = 128
"""Steps at the beginning of a run in which what is usual is learnt: the window of the detectors."""


@dataclass(frozen=True)
class Grid:
    """C columns, in their order; those without a step are left out."""

    width: int
    """Steps a column."""

    index_C: Indices
    """Column i holds the steps from i * width on."""

    numbers: dict[str, Float64s]
    """[C] by HOW: of loss and norms the largest (inf: one was not finite), of `clip_coef`,
    `loss_scale` and limits the least, of `clipped`, `skipped` and `count` how many steps."""

    limits: dict[str, Float64s]
    peaks_CL: Float32s
    """The largest norm of each layer; inf where one was not finite."""

    usual_CL: Float32s
    """log10 of the baseline of each layer where the column begins; NaN while there is none."""

    @property
    def steps_C(self) -> Indices:
        """The first step that a column may hold."""
        return self.index_C * self.width

    @property
    def middle_C(self) -> Float64s:
        """Where to draw it: a column of one step is at that step."""
        return self.steps_C + np.float64((self.width - 1) / 2)

    def widened(self, factor: int) -> Grid:
        """Columns of `factor` times the width."""
        if factor == 1:
            return self
        return _grouped(replace(self, width=self.width * factor, index_C=self.index_C // factor))

    def between(self, start: int, stop: int) -> Grid:
        """Those with any of the steps `start` to `stop` (not included)."""
        first, last = start // self.width, -(-stop // self.width)
        low, high = np.searchsorted(self.index_C, (first, last))
        return _taken(self, slice(int(low), int(high)))


def grid_of(rows: Rows, width: int) -> Grid:
    """Without baselines, which `with_usual` adds."""
    count = len(rows.steps_N)
    numbers = {name: rows.numbers[name] for name in HOW if name != "count"}
    numbers["count"] = np.ones(count)
    usual_NL = np.broadcast_to(np.float32(np.nan), rows.norms_NL.shape)
    grid = Grid(width, rows.steps_N // width, numbers, rows.limits, rows.norms_NL, usual_NL)
    return _grouped(grid)


def with_usual(grid: Grid, usual_CL: Float32s) -> Grid:
    return replace(grid, usual_CL=usual_CL)


def joined(grids: Sequence[Grid]) -> Grid:
    """Grids of one width as one; columns may be in several of them."""
    first = grids[0]
    return _grouped(
        Grid(
            first.width,
            np.concatenate([grid.index_C for grid in grids]),
            {k: np.concatenate([grid.numbers[k] for grid in grids]) for k in first.numbers},
            {k: np.concatenate([grid.limits[k] for grid in grids]) for k in first.limits},
            np.concatenate([grid.peaks_CL for grid in grids]),
            np.concatenate([grid.usual_CL for grid in grids]),
        )
    )


def columns_for(num_steps: int, most: int, least_width: int = 1) -> int:
    """The least width, a power of two times `least_width`, at which columns are at most so many."""
    width = least_width
    while width * most < num_steps:
        width *= 2
    return width


def _grouped(grid: Grid) -> Grid:
    """Columns with the same index become one."""
    index_C = grid.index_C
    if len(index_C) == 0 or (np.diff(index_C) > 0).all():
        return grid
    if (np.diff(index_C) < 0).any():
        grid = _taken(grid, np.argsort(index_C, kind="stable"))
        index_C = grid.index_C
    first = np.flatnonzero(np.diff(index_C, prepend=index_C[0] - 1))
    return Grid(
        grid.width,
        index_C[first],
        {name: HOW[name].reduceat(values, first) for name, values in grid.numbers.items()},
        {rule: np.fmin.reduceat(values, first) for rule, values in grid.limits.items()},
        largest(grid.peaks_CL, first),
        grid.usual_CL[first],
    )


def largest(values_NL: Float32s, first: Indices) -> Float32s:
    """[C, L] of the rows from each place in `first` to the next; ufunc.reduceat takes five times
    as long along this axis."""
    found = np.empty((len(first), values_NL.shape[1]), dtype=values_NL.dtype)
    for column, (begin, end) in enumerate(pairwise([*first, len(values_NL)])):
        np.maximum.reduce(values_NL[begin:end], axis=0, out=found[column])
    return found


def _taken(grid: Grid, which: Any) -> Grid:
    return Grid(
        grid.width,
        grid.index_C[which],
        {name: values[which] for name, values in grid.numbers.items()},
        {rule: values[which] for rule, values in grid.limits.items()},
        grid.peaks_CL[which],
        grid.usual_CL[which],
    )
