"""StepRecord to a row of SQLite and back.

Norms are little-endian float32 BLOBs with one value per parameter. What is the same everywhere is
not stored: coefs are NULL when all are 1 and one float when all are equal, `absent` is NULL when
every parameter had a gradient.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from gradwatch.records import SAMPLES, Anomaly, Culprit, RunInfo, StepRecord

__all__ = ["ANOMALY_COLUMNS", "COLUMNS", "anomaly_from", "anomaly_row", "record_from", "row_of"]

COLUMNS = (
    "step",
    "time",
    "duration_seconds",
    "overhead_seconds",
    "total_norm",
    "total_norm_clipped",
    "clip_coef",
    "fired",
    "clipped",
    "skipped",
    "micro_batches",
    "weight",
    "loss_scale",
    "learning_rate",
    "limits",
    "scalars",
    "norms",
    "coefs",
    "absent",
    "measures",
    "noise_scale",
    "samples",
    "local_norm",
)
ANOMALY_COLUMNS = ("kind", "level", "step", "layer", "layers", "value", "expected", "message")


def row_of(record: StepRecord, rules: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of COLUMNS. Floats that are not finite become text, since NaN would be NULL."""
    fired = sum(1 << k for k, rule in enumerate(rules) if rule in record.fired)
    return (
        record.step,
        record.time,
        _number(record.duration_seconds),
        record.overhead_seconds,
        _number(record.total_norm),
        _number(record.total_norm_clipped),
        _number(record.clip_coef),
        fired,
        record.clipped,
        record.skipped,
        record.micro_batches,
        _number(record.weight),
        _number(record.loss_scale),
        _number(record.learning_rate),
        _floats("<f8", [record.limits.get(rule, math.nan) for rule in rules]) if rules else None,
        _scalars(record),
        _floats("<f4", record.tensor_norms_P),
        _coefs(record.tensor_coefs_P),
        None if record.present_P.all() else np.packbits(~record.present_P).tobytes(),
        _floats("<f4", list(record.measures.values())) if record.measures else None,
        _number(record.noise_scale),
        _floats("<f4", [record.samples[name] for name in SAMPLES]) if record.samples else None,
        None if math.isnan(record.local_norm) else _number(record.local_norm),
    )


def record_from(
    row: Any, info: RunInfo, anomalies: tuple[Anomaly, ...] = (), culprit: Culprit | None = None
) -> StepRecord:
    """The record of a row with COLUMNS, in that order."""
    values = dict(zip(COLUMNS, row, strict=True))
    count = len(info.layout.parameters)
    limits, measures = values.pop("limits"), values.pop("measures")
    samples = values.pop("samples")
    bits, absent, coefs = values.pop("fired"), values.pop("absent"), values.pop("coefs")
    scalars = json.loads(values.pop("scalars") or "{}")
    floats: dict[str, Any] = {
        name: float(values.pop(name))
        for name in COLUMNS
        if isinstance(values.get(name), (str, float)) and name != "skipped"
    }
    return StepRecord(
        step=values["step"],
        layout=info.layout,
        fired=tuple(name for k, name in enumerate(info.rules) if bits >> k & 1),
        clipped=bool(values["clipped"]),
        skipped=values["skipped"],
        micro_batches=values["micro_batches"],
        limits=dict(zip(info.rules, np.frombuffer(limits or b"", "<f8").tolist(), strict=True)),
        measures=_by_name(measures, info.measures),
        samples=_by_name(samples, SAMPLES),
        scalars={name: float(value) for name, value in scalars.items()},
        tensor_norms_P=np.frombuffer(values["norms"], "<f4"),
        tensor_coefs_P=_all_coefs(coefs, count),
        present_P=_present(absent, count),
        anomalies=anomalies,
        culprit=culprit,
        **floats,
    )


def _by_name(stored: bytes | None, names: tuple[str, ...]) -> dict[str, Any]:
    if stored is None:
        return {}
    values = np.frombuffer(stored, "<f4").reshape(len(names), -1)
    return dict(zip(names, values, strict=True))


def anomaly_row(anomaly: Anomaly) -> tuple[Any, ...]:
    """The values of ANOMALY_COLUMNS."""
    return (
        anomaly.kind,
        anomaly.level,
        anomaly.step,
        anomaly.layer,
        json.dumps(anomaly.layers),
        _number(anomaly.value),
        _number(anomaly.expected),
        anomaly.message,
    )


def anomaly_from(row: Any) -> Anomaly:
    kind, level, step, layer, layers, value, expected, message = row
    return Anomaly(
        kind=kind,
        level=level,
        step=step,
        layer=layer,
        layers=tuple(json.loads(layers)),
        value=float(value),
        expected=float(expected),
        message=message,
    )


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _scalars(record: StepRecord) -> str | None:
    if not record.scalars:
        return None
    return json.dumps({name: _number(value) for name, value in record.scalars.items()})


def _floats(dtype: str, values: Any) -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


def _coefs(coefs_P: Any) -> bytes | float | None:
    if coefs_P.size == 0 or (coefs_P == coefs_P[0]).all():
        first = float(coefs_P[0]) if coefs_P.size else 1.0
        return None if first == 1.0 else first
    return _floats("<f4", coefs_P)


def _all_coefs(stored: bytes | float | None, count: int) -> Any:
    if isinstance(stored, bytes):
        return np.frombuffer(stored, "<f4")
    return np.full(count, 1.0 if stored is None else stored, dtype=np.float32)


def _present(absent: bytes | None, count: int) -> Any:
    if absent is None:
        return np.ones(count, dtype=np.bool_)
    return np.unpackbits(np.frombuffer(absent, np.uint8), count=count) == 0
