"""One layer in depth: its norms and its neighbours', its departure, multiplier and updates.

Only the tensors that are shown are taken out of each row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.page.columns import Columns
from gradwatch.page.grid import columns_for
from gradwatch.page.reading import reading
from gradwatch.records import SAMPLES, Float64s, RunInfo

__all__ = ["departure", "layer_columns", "neighbours_of"]

BESIDE = 2
WINDOW = 128
WARMED_UP = 32
"""Steps before the first departure is drawn."""

SPREAD = 1.4826
LEAST_SPREAD = 0.25
"""Both as the detector `exploding` has them."""

AT_ONCE = 20_000
MOST_COLUMNS = 1200


def neighbours_of(info: RunInfo, place: int) -> list[int]:
    """Places of a layer and those beside it, in the order of the model."""
    count = len(info.layout.layers)
    return list(range(max(0, place - BESIDE), min(count, place + BESIDE + 1)))


def layer_columns(
    path: Path, info: RunInfo, place: int, start: int, stop: int, most: int = MOST_COLUMNS
) -> dict[str, Columns]:
    """The sources of the figures of one layer, over the steps `start` to `stop` (not included).

    Raises:
        RecordingError: the recording cannot be read.
    """
    shown = neighbours_of(info, place)
    layer_of = info.layout.layer_of_P
    tensors = np.flatnonzero(np.isin(layer_of, shown))
    low, high = int(tensors.min()), int(tensors.max()) + 1
    with reading(path) as connection:
        rows = _rows(connection, low, high, len(layer_of), start - WINDOW, stop)
    steps_N = np.array([row[0] for row in rows], dtype=np.int64)
    tensors_NP = _floats([row[1] for row in rows], high - low)
    of = layer_of[low:high]
    squares = np.square(tensors_NP)
    norms = {i: np.sqrt(squares[:, of == i].sum(axis=1)) for i in shown}
    norms = {i: np.where(np.isfinite(values), values, np.inf) for i, values in norms.items()}
    mine = of == place
    coefs_NP = _coefs([row[2] for row in rows], high - low)
    with np.errstate(all="ignore"):
        left = np.sqrt((squares * np.square(coefs_NP))[:, mine].sum(axis=1)) / norms[place]
        update, weight = (_norms([row[k] for row in rows], high - low, mine) for k in (3, 4))
        ratio = update / weight
    z = departure(norms[place])
    width = columns_for(stop - start, most)
    within = steps_N >= start
    values = {
        **{f"norm {k}": norms[i] for k, i in enumerate(shown)},
        "z": z, "coef": np.where(np.isfinite(left), left, np.nan), "ratio": ratio,
    }  # fmt: skip
    x, columns = _columns(steps_N[within], {k: v[within] for k, v in values.items()}, width)
    mine_C = columns[f"norm {shown.index(place)}"]
    known = np.isfinite(columns["ratio"]) & (columns["ratio"] > 0)
    return {
        "layer norm": {
            "x": x,
            **{f"norm {k}": _positive(columns[f"norm {k}"]) for k in range(len(shown))},
        },
        "nonfinite": {"x": x[np.isinf(mine_C)]},
        "z": {"x": x, "z": columns["z"]},
        "coef": {"x": x, "coef": columns["coef"]},
        "update": {"x": x[known], "ratio": columns["ratio"][known]},
    }


def departure(norms_N: Float64s) -> Float64s:
    """z of the logarithm of each norm, from median and MAD of the steps before it; NaN where there
    are too few or it is not finite."""
    with np.errstate(all="ignore"):
        logs = np.log(norms_N)
    logs = np.where(np.isfinite(logs), logs, np.nan)
    z = np.full(len(logs), np.nan)
    padded = np.concatenate([np.full(WINDOW, np.nan), logs])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    for begin in range(WARMED_UP, len(logs), AT_ONCE):
        end = min(begin + AT_ONCE, len(logs))
        before = windows[begin:end]
        enough = np.isfinite(before).sum(axis=1) >= WARMED_UP
        if not enough.any():
            continue
        before, now = before[enough], logs[begin:end][enough]
        median = np.nanmedian(before, axis=1)
        spread = SPREAD * np.nanmedian(np.abs(before - median[:, None]), axis=1)
        z[begin:end][enough] = (now - median) / np.maximum(spread, LEAST_SPREAD)
    return z


def _rows(
    connection: sqlite3.Connection, low: int, high: int, count: int, start: int, stop: int
) -> list[Any]:
    known = {row[1] for row in connection.execute("PRAGMA table_info(steps)")}
    if not known:
        return []

    def cut(column: str, first: int) -> str:
        return f"substr({column}, {4 * first + 1}, {4 * (high - low)})"

    sampled = [
        cut("samples", SAMPLES.index(name) * count + low) if "samples" in known else "NULL"
        for name in ("update_norm", "weight_norm")
    ]
    coefs = f"CASE typeof(coefs) WHEN 'blob' THEN {cut('coefs', low)} ELSE coefs END"
    query = f"SELECT step, {cut('norms', low)}, {coefs}, {', '.join(sampled)} FROM steps"
    return connection.execute(
        f"{query} WHERE step >= ? AND step < ? ORDER BY id", (start, stop)
    ).fetchall()


def _floats(stored: Sequence[bytes | None], width: int) -> Float64s:
    """[N, width]; NaN where nothing was stored."""
    nothing = np.full(width, np.nan, dtype="<f4").tobytes()
    table = np.frombuffer(b"".join(one or nothing for one in stored), "<f4")
    return table.reshape(len(stored), width).astype(np.float64)


def _coefs(stored: Sequence[bytes | float | None], width: int) -> Float64s:
    """[N, width]; a recording keeps one number where all are alike, and none where that is 1."""
    table = np.ones((len(stored), width))
    for i, one in enumerate(stored):
        if isinstance(one, bytes):
            table[i] = np.frombuffer(one, "<f4")
        elif one is not None:
            table[i] = one
    return table


def _norms(stored: Sequence[bytes | None], width: int, mine: Any) -> Float64s:
    norms: Float64s = np.sqrt(np.square(_floats(stored, width)[:, mine]).sum(axis=1))
    return norms


def _columns(steps_N: Any, values: dict[str, Float64s], width: int) -> tuple[Float64s, Any]:
    """Where each column is, and what is worth seeing of it."""
    if not len(steps_N):
        return np.empty(0), {name: np.empty(0) for name in values}
    order = np.argsort(steps_N // width, kind="stable")
    index = (steps_N // width)[order]
    first = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
    found = {}
    for name, column in values.items():
        most = np.fmax.reduceat(column[order], first)
        least = np.fmin.reduceat(column[order], first)
        if name == "coef":
            most = least
        elif name == "z":
            most = np.where(-least > most, least, most)
        found[name] = most
    return index[first] * width + np.float64((width - 1) / 2), found


def _positive(values: Float64s) -> Float64s:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
