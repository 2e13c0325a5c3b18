"""A watch in one line: how many layers, which step, what was clipped and found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gradwatch.pipeline import Pipeline
from gradwatch.records import RunInfo, StepRecord

__all__ = ["described"]

RECENT = 100
"""Steps that are looked back at."""


class _Described(Protocol):
    pipeline: Pipeline

    @property
    def info(self) -> RunInfo: ...

    def history(self, count: int) -> Sequence[StepRecord]: ...


def described(watch: _Described) -> str:
    """62 layers, step 4100, total_norm 0.83, clipped 12 of last 100, no anomaly"""
    layers = f"{len(watch.info.layout.layers)} layers"
    recent = watch.history(RECENT)
    if not recent:
        return f"{layers}, no step yet"
    clipped = sum(record.clipped for record in recent)
    skipped = sum(record.skipped is not None for record in recent)
    kinds = ", ".join(sorted(watch.pipeline.consumer.open_anomalies()))
    parts = [
        layers,
        f"step {recent[-1].step}",
        f"total_norm {recent[-1].total_norm:.3g}",
        f"{'mode shadow: ' if watch.info.is_shadow else ''}clipped {clipped} of last {len(recent)}",
    ]
    if skipped:
        parts.append(f"skipped {skipped}")
    parts.append(kinds or "no anomaly")
    return ", ".join(parts)
