"""Cards of what is found behind the training thread: warnings and alerts of records.

    record with anomalies, the records before it  ->  Card  ->  store

A step that is not finite has its card already, written before its update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from gradwatch.recording.cards import Card, card_of
from gradwatch.records import POLICY, Anomaly, Culprit, Float64s, RunInfo, StepRecord
from gradwatch.rules.culprit_explosion import GROWN, of_explosion

__all__ = ["cards_of"]

EXPLODING = "exploding"
COMPARED = 128
"""Steps before an explosion that it is compared with."""

LATENCY = 5
"""Steps that an explosion may have lasted when it is found."""


def cards_of(
    info: RunInfo,
    record: StepRecord,
    past: Sequence[StepRecord],
    order: Callable[[], Sequence[int]],
    *,
    loss_before: bool,
) -> list[Card]:
    """
    Args:
        past: the records before it, oldest first.
        order: of parameters in the backward pass.
        loss_before: whether the loss is logged before the step.
    """
    found = []
    for anomaly in record.anomalies:
        if anomaly.level == "event" or anomaly.kind == POLICY:
            continue
        if anomaly.kind == "nonfinite" and record.culprit is not None:
            continue
        culprit = None
        if anomaly.kind == EXPLODING:
            culprit = _of_explosion(info, anomaly, record, past, order(), loss_before)
        found.append(card_of(info, anomaly, [*past, record], culprit))
    return found


def _of_explosion(
    info: RunInfo,
    anomaly: Anomaly,
    record: StepRecord,
    past: Sequence[StepRecord],
    order: Sequence[int],
    loss_before: bool,
) -> Culprit:
    layer_of = info.layout.layer_of
    layers = list(dict.fromkeys(layer_of[place] for place in order if place < len(layer_of)))
    if not layers:
        return Culprit(message="not determined: the order of the backward pass is not known")
    before = [
        one
        for one in past[-COMPARED:]
        if one.step <= anomaly.step - LATENCY
        and one.skipped is None
        and math.isfinite(one.total_norm)
    ]
    norms_TL = np.array([one.grad_norms for one in before], dtype=np.float64)
    norms_TL = (
        norms_TL.reshape(len(before), -1)[:, layers] if before else np.empty((0, len(layers)))
    )
    # The update of its first step has changed the loss of the others.
    began = [one for one in past if one.step > anomaly.step - LATENCY]
    first = next((one for one in began if _has_grown(norms_TL, _norms(one, layers))), record)
    found = of_explosion(
        [info.layout.layers[i] for i in layers],
        norms_TL,
        _norms(first, layers),
        [one.scalars.get("loss", math.nan) for one in before],
        first.scalars.get("loss") if loss_before else None,
    )
    if not found.near:
        return found
    # The finding is of a later step, in which another layer may be the worst.
    return replace(found, message=f"step {first.step}, over the medians before it: {found.message}")


def _norms(record: StepRecord, layers: Sequence[int]) -> Float64s:
    return record.grad_norms.astype(np.float64)[layers]


def _has_grown(before_TL: Float64s, now_L: Float64s) -> bool:
    return len(before_TL) > 0 and bool((now_L > GROWN * np.median(before_TL, axis=0)).any())
