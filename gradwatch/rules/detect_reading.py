"""A record in, what every detector needs of it out: computed once.

StepRecord, regime  ->  Reading: norms[L], their logarithms, and what they are good for
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gradwatch.records import Anomaly, Bools, Float64s, Layout, StepRecord
from gradwatch.rules.detect_regime import Change

__all__ = ["LISTED", "Detector", "Reading", "named", "read"]

LISTED = 5
"""Layers that an anomaly names; its message counts the rest."""

LEAST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One record as detectors see it."""

    record: StepRecord
    norms_L: Float64s
    log_norms_L: Float64s
    """ln(norm). Zero is finite but has no logarithm: it counts as ln of the least float, so it
    is never too large, and is not `usable_L`."""

    judged_L: Bools
    """The layer had a gradient and its norm is finite."""

    usable_L: Bools
    """Judged, and not zero: a value that a baseline may take in."""

    all_usable: bool
    finite_L: Bools
    all_finite: bool
    """The total norm included."""

    learns: bool
    """False for a skipped step and for one of unusual accumulation: no baseline takes it in."""

    stale: bool
    """Every norm is the same to the bit as in the record before: nothing was computed anew."""

    odd: bool
    """Made from far fewer or far more micro-batches than usual."""

    open_alerts: Mapping[str, Bools]
    """[L] the layers with an open alert when the record came, by kind; only where there are any."""

    changes: Sequence[Change]
    """The last changes by intention, oldest first."""


class Detector(Protocol):
    """Readings in, anomalies out; one detector may know several kinds.

    It is a pure function of the readings and its arrays, which it updates in place.
    """

    def observe(self, reading: Reading) -> list[Anomaly]:
        """The anomalies that begin with this record."""

    def begin_anew(self, *, rescales: bool) -> None:
        """A change by intention was announced, which may rescale the norm or not."""

    def active(self) -> dict[str, tuple[str, ...]]:
        """Kinds with an open alert, each with its layers, worst first."""

    def open_alerts(self) -> dict[str, Bools]:
        """[L] the same as masks."""

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The state, live; each name is the detector's own."""

    def restored(self) -> None:
        """To be called when `arrays` were written to."""


def read(
    layout: Layout,
    record: StepRecord,
    *,
    stale: bool,
    odd: bool,
    open_alerts: Mapping[str, Bools],
    changes: Sequence[Change],
) -> Reading:
    norms_L = layout.layer_norms(record.tensor_norms_P)
    finite_L = np.isfinite(norms_L)
    everywhere = np.count_nonzero(record.present_P) == len(record.present_P)
    judged_L = finite_L if everywhere else finite_L & record.present_L
    usable_L = judged_L & (norms_L > 0)
    return Reading(
        record=record,
        norms_L=norms_L,
        log_norms_L=np.log(np.maximum(norms_L, LEAST)),
        judged_L=judged_L,
        usable_L=usable_L,
        all_usable=np.count_nonzero(usable_L) == len(usable_L),
        finite_L=finite_L,
        all_finite=math.isfinite(record.total_norm) and np.count_nonzero(finite_L) == len(finite_L),
        learns=record.skipped is None and not odd,
        stale=stale,
        odd=odd,
        open_alerts=open_alerts,
        changes=changes,
    )


def named(layers: tuple[str, ...]) -> str:
    """`layer a and 4 more`: the first of the affected layers, and how many there are."""
    rest = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"layer {layers[0]}{rest}"
