"""Findings in, the one that calls every norm in question out, and so what is not found in them."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.records import Anomaly, StepRecord
from gradwatch.report.aftermath import Aftermath

__all__ = ["BLINDING", "blinding"]

BLINDING = "clipped_elsewhere"
ABOVE = 1.0001
"""Times the limit: no rounding."""


def blinding(
    anomalies: Sequence[Anomaly], latest: StepRecord | None, after: Aftermath | None
) -> Anomaly | None:
    """The last finding of BLINDING; None once a norm has been above what it found to be a limit."""
    found = [one for one in anomalies if one.kind == BLINDING]
    if not found:
        return None
    peak = None if after is None else after.norm
    since = [] if latest is None else [latest.total_norm]
    since += [] if peak is None or peak.step < found[-1].step else [peak.value]
    return None if any(norm > ABOVE * found[-1].value for norm in since) else found[-1]
