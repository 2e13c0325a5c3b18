"""Moments and spans of time in, words for people out."""

from __future__ import annotations

import math
import time

__all__ = ["duration", "utc"]


def utc(seconds: float) -> str:
    """`2026-11-25 16:55:08 UTC`; a dash where it is not known or no time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "–"


def duration(seconds: float) -> str:
    """As people say it: `40 s`, `12 min`, `3.5 h`, `2 days`."""
    if not math.isfinite(seconds):
        return "an unknown time"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            shown = f"{seconds / unit:.1f}" if name == "h" else f"{max(seconds, 0) / unit:.0f}"
            return f"{shown} {name}"
    return f"{seconds / 86400:.0f} days"
