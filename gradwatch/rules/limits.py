"""Step in, limit out: numbers and schedules of a clip rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["limit_at"]


def limit_at(points: Sequence[tuple[int, float]], step: int) -> float:
    """The limit at an optimizer step: linear between the points, flat outside them.

    A plain number is one point. Steps ascend.
    """
    if len(points) == 1:
        return points[0][1]
    steps, values = zip(*points, strict=True)
    return float(np.interp(step, steps, values))
