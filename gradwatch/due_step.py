"""A step from the moment that it is due until it is a row of the recording.

    DueStep, Reading  ->  Row

What was read holds the Q tensors that had a gradient; a row holds all P of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch.backend import StepContext
from gradwatch.recording.ring import Row
from gradwatch.records import Bools, Float32s
from gradwatch.rules.clipping import Limit, Rule
from gradwatch.rules.reading import Reading

__all__ = ["DueStep", "row_of"]


@dataclass(slots=True, kw_only=True)
class DueStep:
    """What is known of a step before anything is measured."""

    number: int
    started: float
    """By the performance counter."""

    time: float
    context: StepContext
    limits: list[float | Limit]
    present: bytes
    rules: tuple[Rule, ...]
    is_lapsed: bool = False
    """Whether the policy was to be enforced and was not any more: nothing comes of its decision."""

    loss: float | None = None
    """As it was logged before the step."""

    is_loss_whole: bool = True
    """Whether it was logged for each of the micro-batches."""

    seen: Any = None
    """What the backend has kept of its forward passes."""

    overhead_seconds: float = 0.0


def row_of(
    step: DueStep,
    reading: Reading,
    *,
    count: int,
    clips: bool,
    skipped: int,
    loss_scale: float,
    noise_scale: float,
    duration_seconds: float,
) -> Row:
    """The row of a step that is over.

    Args:
        count: of the parameters that the recording knows; more may have been added since.
        clips: whether the decision was, or would be, applied.
        skipped: the number of the reason, 0 without one.
    """
    clips = clips and bool(reading.kept_Q.min(initial=1.0) < 1.0)
    clipped = reading.total_norm_clipped if clips else reading.total_norm
    present_P = None
    if not len(reading.norms_Q) == len(step.present) == count:
        present_P = np.frombuffer(step.present, dtype=np.bool_)
    return Row(
        step=step.number,
        time=step.time,
        duration_seconds=duration_seconds,
        overhead_seconds=step.overhead_seconds,
        total_norm=reading.total_norm,
        total_norm_clipped=clipped,
        clip_coef=_ratio(clipped, reading.total_norm) if clips else 1.0,
        fired=sum(1 << k for k, is_over in enumerate(reading.over) if is_over),
        skipped=skipped,
        micro_batches=step.context.micro_batches,
        weight=step.context.weight,
        loss_scale=loss_scale,
        noise_scale=noise_scale,
        learning_rate=step.context.learning_rate,
        limits=reading.limits,
        tensor_norms_P=_of_all(reading.norms_Q, present_P, 0.0, count),
        tensor_coefs_P=_of_all(reading.kept_Q, present_P, 1.0, count) if clips else None,
        present_P=None if present_P is None else present_P[:count],
        measures=tuple(_of_all(values, present_P, 0.0, count) for values in reading.measures),
    )


def _ratio(after: float, before: float) -> float:
    return after / before if before and math.isfinite(before) else 1.0


def _of_all(values_Q: Float32s, present_P: Bools | None, fill: float, count: int) -> Float32s:
    """[P] the values, and `fill` for tensors that had no gradient."""
    if present_P is None:
        return values_Q
    values_P = np.full(len(present_P), fill, dtype=np.float32)
    values_P[present_P] = values_Q
    return values_P[:count]
