"""Numbers to block characters: a column chart on a log scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["columns", "log_chart", "span"]

BLOCKS = " ▁▂▃▄▅▆▇█"
NONFINITE = "×"


def columns(values: Sequence[float], total: int, width: int) -> list[float | None]:
    """The largest value in each of `width` equal parts of `total` steps; None where none is yet.

    The largest, so that one step's spike stays visible; a part with NaN or inf is inf.
    """
    starts = [column * total // width for column in range(width + 1)]
    parts = [values[start : max(end, start + 1)] for start, end in pairwise(starts)]
    return [_worst(part) if part else None for part in parts]


def _worst(values: Sequence[float]) -> float:
    return max(values) if all(map(math.isfinite, values)) else math.inf


def span(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Least and largest of the values that a log scale can show."""
    usable = [value for value in values if value is not None and 0 < value < math.inf]
    return (min(usable), max(usable)) if usable else None


def log_chart(values: Sequence[float | None], height: int) -> list[str]:
    """`height` lines, top first, one character a value: log(value) between least and largest.

    Zero has the lowest block, a value that is not finite a cross in every line, None nothing.
    """
    limits = span(values)
    levels = [_level(value, limits, 8 * height) for value in values]
    return ["".join(_cell(level, row) for level in levels) for row in reversed(range(height))]


def _level(value: float | None, limits: tuple[float, float] | None, top: int) -> float | None:
    """1 to `top`, in eighths of a line; None for nothing, inf for not finite."""
    if value is None:
        return None
    if not math.isfinite(value):
        return math.inf
    if limits is None or value <= 0:
        return 1
    least, largest = (math.log(limit) for limit in limits)
    if largest == least:
        return top // 2
    return 1 + round((top - 1) * (math.log(value) - least) / (largest - least))


def _cell(level: float | None, row: int) -> str:
    if level is None:
        return " "
    if math.isinf(level):
        return NONFINITE
    return BLOCKS[min(max(int(level) - 8 * row, 0), 8)]
