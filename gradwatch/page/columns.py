"""Grids, anomalies and ranks in, the columns of each figure's sources out. No Bokeh here.

A live page asks for these alone, again and again; a figure is made with them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch.page.grid import LEARNING, Grid
from gradwatch.records import Anomaly, Bools, Float32s, Float64s
from gradwatch.saying import one_line

__all__ = [
    "DEPARTURE",
    "MOST_ROWS",
    "Columns",
    "Heat",
    "heat_of",
    "run_columns",
    "short",
    "spans_decades",
    "told_of",
]

Columns = dict[str, Any]
"""Arrays or lists of one length, by column."""

MOST_ROWS = 256
GAP = -99.0
"""In a picture: nothing was recorded there."""

DEPARTURE = 1.5
"""Decades at which the colours of a departure end."""

FAR = 2.0
"""Decades that are a departure all the same: what detectors take for abnormal while they learn."""

LOG_SPAN = 10.0
"""Times its least that a loss must be for a logarithmic axis."""

MARKED = ("alert", "warning", "event")
NAME_LENGTH = 30
MOST_PARTS = 32
"""Of a module's name; what has more is no module's."""


@dataclass(frozen=True)
class Heat:
    """Layers x steps, as two pictures of the same size."""

    columns: Columns
    """`departure` and `absolute`: log10 of the norm over what is usual for the layer, and of the
    norm; NaN where it is not finite, GAP where there is nothing."""

    low: float
    high: float
    """Of the absolute picture."""

    layers_a_row: int


def run_columns(
    grid: Grid | None,
    anomalies: Sequence[Anomaly],
    rules: Sequence[str],
    most_rows: int = MOST_ROWS,
    begun: int = 0,
) -> dict[str, Columns]:
    """The sources of the figures of one run, by name.

    Args:
        begun: the first step of the run.
    """
    found: dict[str, Columns] = {}
    if grid is None:
        grid = _nothing(rules)
    numbers, x = grid.numbers, grid.middle_C
    norms = {name: _drawable(numbers[name]) for name in ("total_norm", "total_norm_clipped")}
    found["norm"] = {
        "x": x, "before": norms["total_norm"], "after": norms["total_norm_clipped"],
        **{f"limit {k}": _drawable(grid.limits[rule]) for k, rule in enumerate(rules)},
    }  # fmt: skip
    found["nonfinite"] = {"x": x[np.isinf(numbers["total_norm"])]}
    found |= _marks(grid, anomalies, norms["total_norm"])
    found["clip"] = {
        "x": x,
        "coef": np.where(np.isfinite(numbers["clip_coef"]), numbers["clip_coef"], np.nan),
        "clipped": 100 * numbers["clipped"] / numbers["count"],
        "skipped": _drawable(100 * numbers["skipped"] / numbers["count"]),
    }
    found["training"] = {
        "x": x,
        "loss": _finite(numbers["loss"]),
        "learning_rate": _drawable(numbers["learning_rate"]),
        "loss_scale": _drawable(numbers["loss_scale"]),
    }
    found["bad loss"] = {"x": x[np.isinf(numbers["loss"])]}
    found["noise"] = {
        "x": x,
        "noise_scale": _drawable(numbers["noise_scale"]),
        "micro_batches": _drawable(numbers["micro_batches"]),
    }
    found["heat"] = heat_of(grid, most_rows, begun).columns
    found["learning"] = _learning(grid, begun)
    return found


def _learning(grid: Grid, begun: int) -> Columns:
    """The part of the heat map whose departures are not known yet; none where it is not shown."""
    is_learning_C = _is_learning(grid, begun)
    if not is_learning_C.any():
        return {"left": [], "right": [], "top": [], "bottom": []}
    index_C = grid.index_C[is_learning_C]
    left, right = index_C[0] * grid.width - 0.5, (index_C[-1] + 1) * grid.width - 0.5
    rows = grid.peaks_CL.shape[1]
    return {"left": [float(left)], "right": [float(right)], "top": [-0.5], "bottom": [rows - 0.5]}


def _is_learning(grid: Grid, begun: int) -> Bools:
    is_learning_C: Bools = grid.steps_C < begun + LEARNING
    return is_learning_C


def heat_of(grid: Grid, most_rows: int = MOST_ROWS, begun: int = 0) -> Heat:
    """Neighbouring layers share a row, with the largest of each, where there are many."""
    layers = grid.peaks_CL.shape[1]
    together = -(-layers // most_rows) if layers else 1
    with np.errstate(all="ignore"):
        logs_CL = np.log10(grid.peaks_CL)
        away_CL = logs_CL - grid.usual_CL
        learning_CL = _is_learning(grid, begun)[:, None] & ~(np.abs(away_CL) > FAR)
    away_CL = np.where(learning_CL, np.float32(0), away_CL)
    bad_CL = np.isinf(grid.peaks_CL)
    positive = logs_CL[np.isfinite(logs_CL)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (-1.0, 1.0)
    high = max(high, low + 0.1)
    pictures = {
        "departure": _picture(grid, _bounded(away_CL, -DEPARTURE), bad_CL, together),
        "absolute": _picture(grid, _bounded(logs_CL, low), bad_CL, together),
    }
    height, width = pictures["absolute"].shape
    first = float(grid.index_C[0] * grid.width) if len(grid.index_C) else 0.0
    place = {"x": [first - 0.5], "dw": [width * grid.width], "y": [-0.5]}
    columns = {name: [picture] for name, picture in pictures.items()}
    return Heat({**columns, **place, "dh": [height * together]}, low, high, together)


def _bounded(values_CL: Float32s, least: float) -> Float32s:
    """No gradient at all is as far below as can be shown; what has no baseline yet is as usual."""
    values_CL = np.where(np.isnan(values_CL), np.float32(0), values_CL)
    return np.maximum(values_CL, np.float32(least)).astype(np.float32)


def _picture(grid: Grid, values_CL: Float32s, bad_CL: Any, together: int) -> Float32s:
    """[rows, columns] with the columns that hold no step as gaps."""
    values_CL = np.where(bad_CL, np.float32(np.inf), values_CL)
    first = np.arange(0, values_CL.shape[1], together)
    if together > 1:
        values_CL = np.maximum.reduceat(values_CL, first, axis=1)
    if not len(grid.index_C):
        return np.full((max(len(first), 1), 1), GAP, dtype=np.float32)
    places = grid.index_C - grid.index_C[0]
    picture = np.full((int(places[-1]) + 1, values_CL.shape[1]), GAP, dtype=np.float32)
    picture[places] = np.where(np.isinf(values_CL), np.float32(np.nan), values_CL)
    return np.ascontiguousarray(picture.T)


def _marks(grid: Grid, anomalies: Sequence[Anomaly], norm_C: Float64s) -> dict[str, Columns]:
    """One mark a column and level, on the line; where there is no line, at its middle."""
    found: dict[str, Columns] = {}
    usable = norm_C[np.isfinite(norm_C)]
    middle = float(np.exp(np.mean(np.log(usable)))) if len(usable) else 1.0
    for level in MARKED:
        places: dict[int, list[Anomaly]] = {}
        for anomaly in anomalies:
            i = int(np.searchsorted(grid.index_C, anomaly.step // grid.width))
            if (
                anomaly.level == level
                and i < len(grid.index_C)
                and grid.index_C[i] == anomaly.step // grid.width
            ):
                places.setdefault(i, []).append(anomaly)
        heights = [norm_C[i] if np.isfinite(norm_C[i]) else middle for i in places]
        found[level] = {
            "x": [float(some[0].step) for some in places.values()],
            "y": [float(height) for height in heights],
            "step": [some[0].step for some in places.values()],
            "kind": [", ".join(sorted({a.kind for a in some})) for some in places.values()],
            "layer": [short(some[0].layer or "", 80) for some in places.values()],
        }
    return found


def told_of(grid: Grid | None) -> list[str]:
    """The figures that have something to show, of those that not every run has; `log loss` and
    `changing settings` where that is what there is to see."""
    if grid is None:
        return []
    numbers = grid.numbers
    rates = [numbers[name] for name in ("learning_rate", "loss_scale")]
    found = []
    if not np.isnan(numbers["loss"]).all():
        found.append("log loss" if spans_decades(numbers["loss"]) else "loss")
    if any(np.isfinite(values).any() for values in rates):
        found.append("changing settings" if any(map(_changes, rates)) else "settings")
    if np.isfinite(numbers["noise_scale"]).any() or (numbers["micro_batches"] > 1).any():
        found.append("noise")
    return found


def spans_decades(losses: Float64s) -> bool:
    """Whether a logarithmic axis shows more of them, and hides none."""
    finite = losses[np.isfinite(losses)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > LOG_SPAN * finite.min())


def _changes(values: Float64s) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.max() != finite.min())


def _nothing(rules: Sequence[str]) -> Grid:
    from gradwatch.page.grid import HOW

    empty: Float64s = np.empty(0)
    flat = np.empty((0, 0), dtype=np.float32)
    index = np.empty(0, dtype=np.int64)
    return Grid(1, index, dict.fromkeys(HOW, empty), dict.fromkeys(rules, empty), flat, flat)


def _drawable(values: Float64s) -> Float64s:
    """On a log axis: what is not positive or not finite is a gap."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _finite(values: Float64s) -> Float64s:
    return np.where(np.isfinite(values), values, np.nan)


def short(name: str, most: int = NAME_LENGTH) -> str:
    """A name that fits: `e.l.3.self_attn.out_proj`, or else its beginning and its end.

    Numbers stay, since blocks are told apart by them. Control characters are replaced.
    """
    name = _abbreviated(one_line(name), most)
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def _abbreviated(name: str, most: int) -> str:
    """Modules by their first letters, from the outermost on, as many as have to be."""
    parts = name.split(".")
    if len(name) <= most or not 1 < len(parts) <= MOST_PARTS or not all(parts):
        return name
    excess = len(name) - most
    for place, part in enumerate(parts[:-1]):
        if excess > 0 and not part.isdecimal():
            parts[place] = part[0]
            excess -= len(part) - 1
    return ".".join(parts)


def by_rank(grids: Mapping[int, Grid | None], what: str) -> dict[str, Columns]:
    """One number of each rank; the largest one of a column, and no column without one."""
    found = {}
    for rank, grid in grids.items():
        if grid is not None:
            known_C = np.isfinite(grid.numbers[what])
            value = _drawable(grid.numbers[what][known_C])
            found[f"rank {rank}"] = {"x": grid.middle_C[known_C], "value": value}
    return found
