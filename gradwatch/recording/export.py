"""A recording in, a table out: CSV or Parquet, one row a step."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import IO, Any, Literal

from gradwatch.errors import RecordingError
from gradwatch.recording.reader import Recording
from gradwatch.records import StepRecord

__all__ = ["Format", "columns_of", "export_recording"]

Format = Literal["csv", "parquet"]


def columns_of(record: StepRecord, *, layers: bool) -> dict[str, Any]:
    """One step as named columns."""
    columns: dict[str, Any] = {
        "step": record.step,
        "time": record.time,
        "duration_seconds": record.duration_seconds,
        "overhead_seconds": record.overhead_seconds,
        "total_norm": record.total_norm,
        "total_norm_clipped": record.total_norm_clipped,
        "clip_coef": record.clip_coef,
        "clipped": record.clipped,
        "fired": " ".join(record.fired),
        "skipped": record.skipped or "",
        "micro_batches": record.micro_batches,
        "weight": record.weight,
        "loss_scale": record.loss_scale,
        "learning_rate": record.learning_rate,
        "noise_scale": record.noise_scale,
        "local_norm": record.local_norm,
        "anomalies": " ".join(anomaly.kind for anomaly in record.anomalies),
    }
    columns |= {f"limit/{rule}": limit for rule, limit in record.limits.items()}
    columns |= {f"scalar/{name}": value for name, value in record.scalars.items()}
    if layers:
        norms = zip(record.layers, record.grad_norms.tolist(), strict=True)
        columns |= {f"grad_norm/{layer}": norm for layer, norm in norms}
        ratios = record.update_ratios.tolist() or [math.nan] * len(record.layers)
        named = zip(record.layers, ratios, strict=True)
        columns |= {f"update_ratio/{layer}": ratio for layer, ratio in named}
    return columns


def export_recording(
    recording: Recording, out: Path | IO[str], format: Format = "csv", *, layers: bool = True
) -> None:
    """Writes every step of a recording.

    Args:
        out: a path; for CSV also an open text file.
        layers: whether each layer's norm has a column `grad_norm/<layer>`.

    Raises:
        RecordingError: Parquet was asked for without pandas and pyarrow, or without a path.
        OSError: the file cannot be written.
    """
    if format == "parquet":
        _parquet(recording, out, layers)
    elif isinstance(out, Path):
        with out.open("w", newline="", encoding="utf-8") as file:
            _csv(recording, file, layers)
    else:
        _csv(recording, out, layers)


def _csv(recording: Recording, file: IO[str], layers: bool) -> None:
    """Two passes, so that a scalar that is logged late has its column from the start."""
    names: dict[str, None] = {}
    for record in recording.records():
        names |= dict.fromkeys(columns_of(record, layers=layers))
    writer = csv.DictWriter(file, list(names or ["step"]), restval="")
    writer.writeheader()
    for record in recording.records():
        columns = columns_of(record, layers=layers)
        writer.writerow({name: columns[name] for name in names if name in columns})


def _parquet(recording: Recording, out: Path | IO[str], layers: bool) -> None:
    if not isinstance(out, Path):
        raise RecordingError("Parquet is a binary format: give a file with -o FILE")
    try:
        import pandas
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise RecordingError(
            f"Parquet needs pandas and pyarrow ({error}): pip install 'gradwatch[pandas]'"
        ) from error
    rows = [columns_of(record, layers=layers) for record in recording.records()]
    pandas.DataFrame(rows).to_parquet(out, index=False)
