"""A loss scaler in, the steps that it dropped unseen out.

With a non-fused optimizer a GradScaler drops a step by not calling it, so no hook runs. What it
leaves is its scale: after each step it grows or stays in a way that is known, and anything lower
was backed off.
"""

from __future__ import annotations

import math
from typing import Any

from gradwatch.errors import AttachError

__all__ = ["ScalerFollower", "follower"]

ASKED = ("get_scale", "get_growth_factor", "get_backoff_factor", "get_growth_interval")


def follower(scaler: Any, optimizer: Any) -> ScalerFollower | None:
    """Of the scaler that is given, or else of the one that a wrapped optimizer steps with.

    Raises:
        AttachError: what is given is no GradScaler.
    """
    if scaler is not None:
        return ScalerFollower(scaler)
    while optimizer is not None:
        found = getattr(optimizer, "scaler", None)
        if found is not None and not _missing(found):
            return ScalerFollower(found)
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _missing(scaler: Any) -> list[str]:
    return [name for name in ASKED if not callable(getattr(scaler, name, None))]


class ScalerFollower:
    """Asked at each step; reads the scaler's scale, which it had to know on the host itself."""

    def __init__(self, scaler: Any) -> None:
        """
        Raises:
            AttachError: it is no GradScaler.
        """
        if missing := _missing(scaler):
            raise AttachError(
                f"scaler= must be a torch.amp.GradScaler. Received: {type(scaler).__name__}, "
                f"which has no {missing[0]}()."
            )
        self._scaler = scaler
        self._expected: tuple[float, int] | None = None

    @property
    def enabled(self) -> bool:
        return bool(self._scaler.is_enabled())

    def update(self) -> int:
        """A number that changes with each update of the scaler; reads no device."""
        scale = getattr(self._scaler, "_scale", None)
        return -1 if scale is None else int(scale._version)

    def step(self) -> tuple[float, int]:
        """At a step that is taken: the loss scale, and how many were dropped since the last one.

        A scale that was set by hand in between is not mistaken for more than it may be: only whole
        powers of the backoff factor count.
        """
        if not self.enabled:
            return math.nan, 0
        scale, tracker = float(self._scaler.get_scale()), self._growth_tracker()
        dropped = 0
        if self._expected is not None and (scale, tracker) != self._expected:
            dropped = self._backoffs(self._expected[0], scale)
        self._expected = self._after(scale, tracker)
        return scale, dropped

    def _after(self, scale: float, tracker: int) -> tuple[float, int]:
        """What `update` makes of a step without infinities."""
        if tracker + 1 < self._scaler.get_growth_interval():
            return scale, tracker + 1
        grown = scale * self._scaler.get_growth_factor()
        return (grown if math.isfinite(grown) else scale), 0

    def _backoffs(self, expected: float, scale: float) -> int:
        if scale >= expected or scale <= 0:
            return 0
        power = math.log(scale / expected) / math.log(self._scaler.get_backoff_factor())
        count = round(power)
        return count if abs(power - count) < 1e-3 else 0

    def _growth_tracker(self) -> int:
        tracker = getattr(self._scaler, "_growth_tracker", None)
        return 0 if tracker is None else int(tracker)
