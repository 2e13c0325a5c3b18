"""Rows of a recording to arrays, without a record for each: a picture needs all of them at once.

    steps after a row, or from a step to another  ->  Rows

A value that is not there is NaN, one that is not finite is inf, so that both survive a maximum.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import RecordingError
from gradwatch.recording.reader import connected, known_columns
from gradwatch.records import Float32s, Float64s, Layout, RunInfo, StepRecord

__all__ = [
    "NUMBERS",
    "Rows",
    "layer_norms",
    "reading",
    "rows_after",
    "rows_between",
    "rows_of",
    "steps_in",
]

JUDGED = ("total_norm", "total_norm_clipped", "loss")
"""Where inf and NaN are news, not a value that is not known."""

STORED = (
    "total_norm", "total_norm_clipped", "clip_coef", "clipped", "skipped", "micro_batches",
    "loss_scale", "learning_rate", "noise_scale", "local_norm", "duration_seconds", "time",
)  # fmt: skip

NUMBERS = ("loss", *STORED)

AT_ONCE = 4096
"""Rows whose norms are in memory as bytes and as numbers at the same time."""


@dataclass(frozen=True)
class Rows:
    """N steps in the order they were made."""

    last: int
    """The row behind which the next ones come; 0 where there are none."""

    steps_N: npt.NDArray[np.int64]
    numbers: dict[str, Float64s]
    """[N] by NUMBERS; `clipped` and `skipped` are 0 or 1."""

    limits: dict[str, Float64s]
    """[N] by rule; NaN where none was in force."""

    norms_NL: Float32s


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """
    Raises:
        RecordingError: the file cannot be read, or holds what no recording does.
    """
    try:
        with closing(connected(path)) as connection:
            yield connection
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise RecordingError(f"{path}: cannot be read ({error})") from error


def rows_after(connection: sqlite3.Connection, info: RunInfo, row: int, most: int) -> Rows:
    """The rows behind one, at most so many; none where a writer has left no tables."""
    return _rows(connection, info, "id > ? ORDER BY id LIMIT ?", (row, most))


def rows_between(
    connection: sqlite3.Connection, info: RunInfo, start: int, stop: int
) -> Iterator[Rows]:
    """Steps `start` to `stop` (not included), some thousands at a time."""
    last = 0
    while True:
        where = "step >= ? AND step < ? AND id > ? ORDER BY id LIMIT ?"
        rows = _rows(connection, info, where, (start, stop, last, AT_ONCE))
        if not len(rows.steps_N):
            return
        yield rows
        last = rows.last


def rows_of(records: Sequence[StepRecord], info: RunInfo) -> Rows:
    """Records that are not in SQLite yet."""
    numbers = {
        name: np.array([_number(record, name) for record in records], dtype=np.float64)
        for name in NUMBERS
    }
    tensors = np.array([record.tensor_norms_P for record in records], dtype=np.float32)
    limits = {
        rule: np.array([record.limits.get(rule, np.nan) for record in records], dtype=np.float64)
        for rule in info.rules
    }
    steps = np.array([record.step for record in records], dtype=np.int64)
    width = len(info.layout.parameters)
    return Rows(0, steps, numbers, limits, layer_norms(info.layout, tensors.reshape(-1, width)))


def _number(record: StepRecord, name: str) -> float:
    if name == "loss":
        value = record.scalars.get("loss")
        return np.nan if value is None else float(value) if np.isfinite(value) else np.inf
    if name == "skipped":
        return float(record.skipped is not None)
    value = float(getattr(record, name))
    return value if np.isfinite(value) else np.inf if name in JUDGED else np.nan


def _rows(connection: sqlite3.Connection, info: RunInfo, where: str, values: Any) -> Rows:
    found: list[Any] = []
    if _has_steps(connection):
        known = known_columns(connection).split(", ")
        columns = [next(c for c in known if c.split()[-1] == name) for name in STORED]
        loss = "json_extract(scalars, '$.loss')"
        query = f"SELECT {loss}, {', '.join(columns)}, limits, norms, id, step FROM steps"
        found = connection.execute(f"{query} WHERE {where}", values).fetchall()
    if not found:
        return rows_of([], info)
    *stored, limits, norms, ids, steps = zip(*found, strict=True)
    numbers = {
        name: _numbers(name, column) for name, column in zip(("loss", *STORED), stored, strict=True)
    }
    tensors = np.frombuffer(b"".join(norms), "<f4").reshape(len(steps), -1)
    if tensors.shape[1] != len(info.layout.parameters):
        raise RecordingError("a row has not as many norms as the run has parameters")
    return Rows(
        int(ids[-1]),
        np.array(steps, dtype=np.int64),
        numbers,
        _limits(limits, info.rules),
        layer_norms(info.layout, tensors),
    )


def _numbers(name: str, column: Sequence[Any]) -> Float64s:
    """None is NaN; text is how a recording stores what is not finite."""
    if name == "skipped":
        return np.array([value is not None for value in column], dtype=np.float64)
    values = np.array(column, dtype=np.float64)
    for i in np.flatnonzero(~np.isfinite(values)).tolist():
        is_news = name in JUDGED and column[i] is not None
        values[i] = np.inf if is_news else np.nan
    return values


def _limits(stored: Sequence[bytes | None], rules: Sequence[str]) -> dict[str, Float64s]:
    nothing = np.full(len(rules), np.nan).tobytes()
    table = np.frombuffer(b"".join(one or nothing for one in stored), "<f8")
    table = table.reshape(len(stored), len(rules))
    return {rule: table[:, k] for k, rule in enumerate(rules)}


def _has_steps(connection: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE name = 'steps'"
    return connection.execute(query).fetchone() is not None


def layer_norms(layout: Layout, tensors_NP: Float32s) -> Float32s:
    """L2 norm of each layer in each step [N, L]; inf where one of its tensors is not finite."""
    with np.errstate(all="ignore"):
        if layout.layer_of == tuple(range(len(layout.layers))):
            norms_NL = tensors_NP
        else:
            order = np.argsort(layout.layer_of_P, kind="stable")
            first = np.flatnonzero(np.diff(layout.layer_of_P[order], prepend=-1))
            squares = np.square(tensors_NP[:, order], dtype=np.float64)
            norms_NL = np.sqrt(np.add.reduceat(squares, first, axis=1)).astype(np.float32)
    finite_NL = np.isfinite(norms_NL)
    return norms_NL if finite_NL.all() else np.where(finite_NL, norms_NL, np.float32(np.inf))


def steps_in(connection: sqlite3.Connection) -> tuple[int, int] | None:
    """The least and the largest step; None where there is none."""
    if not _has_steps(connection):
        return None
    low, high = connection.execute("SELECT min(step), max(step) FROM steps").fetchone()
    return None if low is None else (int(low), int(high))
