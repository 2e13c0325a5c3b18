"""`nonfinite` and `overflow`: norms that are inf or NaN.

    nonfinite   any norm of the record, total or layer        ALERT at once
    overflow    ... of a step that the loss scaler drops      EVENT: it is how it finds its scale

An overflow is `nonfinite` when the scale has collapsed (below 1) or the loss is not finite either:
lowering the scale will not mend that.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from gradwatch.records import Anomaly, Bools, Level, StepRecord
from gradwatch.rules.detect_reading import LISTED, Reading
from gradwatch.rules.episodes import Episodes
from gradwatch.rules.guard import was_dropped

__all__ = ["CLEAR_AFTER", "Nonfinite", "finding_of", "is_overflow"]

CLEAR_AFTER = 5
"""Finite steps in a row that end an episode."""

KIND = "nonfinite"
KINDS: dict[Level, str] = {"alert": KIND, "event": "overflow"}


class Nonfinite:
    """Layers in layout order, and behind them the total norm as one more."""

    def __init__(self, layers: tuple[str, ...], kinds: Collection[str], is_shadow: bool) -> None:
        self._layers = layers
        self._is_shadow = is_shadow
        self._episodes: dict[Level, Episodes] = {
            level: Episodes(len(layers) + 1, need=1, of=1, clear_after=CLEAR_AFTER)
            for level, kind in KINDS.items()
            if kind in kinds
        }

    def observe(self, reading: Reading) -> list[Anomaly]:
        record = reading.record
        if reading.all_finite and not any(e.any_open for e in self._episodes.values()):
            return []
        hit_T = ~np.append(reading.finite_L, math.isfinite(record.total_norm))
        loss = record.scalars.get("loss")
        overflow = is_overflow(record.skipped, record.loss_scale, loss)
        level: Level = "event" if overflow else "alert"
        judged_T = np.ones_like(hit_T)
        anomalies = []
        for of_level, episodes in self._episodes.items():
            hit = hit_T if of_level == level else np.zeros_like(hit_T)
            begins = episodes.update(record.step, hit, ~hit_T, judged_T)
            if begins.size:
                anomalies.append(finding_of(record, level, self._is_shadow))
        return anomalies

    def begin_anew(self, *, rescales: bool) -> None:
        """Nothing to begin: what is finite needs no baseline."""

    def active(self) -> dict[str, tuple[str, ...]]:
        episodes = self._episodes.get("alert")
        return {KIND: self._names(episodes.open_L)} if episodes and episodes.any_open else {}

    def open_alerts(self) -> dict[str, Bools]:
        episodes = self._episodes.get("alert")
        return {KIND: episodes.open_L[:-1].copy()} if episodes and episodes.any_open else {}

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {
            f"{level}.{name}": array
            for level, episodes in self._episodes.items()
            for name, array in episodes.arrays().items()
        }

    def restored(self) -> None:
        for episodes in self._episodes.values():
            episodes.restored()

    def _names(self, hit_T: Bools) -> tuple[str, ...]:
        return tuple(self._layers[i] for i in np.flatnonzero(hit_T[:-1]))


def finding_of(record: StepRecord, level: Level, is_shadow: bool) -> Anomaly:
    """What is said of a step that is not finite.

    Args:
        is_shadow: whether the policy's decisions are not applied.
    """
    norms_L = record.layout.layer_norms(record.tensor_norms_P)
    layers = tuple(record.layers[i] for i in np.flatnonzero(~np.isfinite(norms_L)))
    culprit = record.culprit
    everywhere = len(layers) == len(record.layers) > 1
    layer = layers[0] if layers and not everywhere else None
    if culprit is not None and culprit.module in record.layers:
        layer = culprit.module
    where = "" if culprit is None or not culprit.message else f"; {culprit.message}"
    kind = KINDS[level]
    return Anomaly(
        kind=kind,
        level=level,
        step=record.step,
        layer=layer,
        layers=layers[:LISTED],
        value=record.total_norm,
        message=f"{kind}: {_what(layers, record)}{where}{_outcome(record, is_shadow)}",
    )


def is_overflow(skipped: str | None, loss_scale: float, loss: float | None) -> bool:
    """Whether the loss scaler is looking for its scale, and may yet find it.

    Args:
        skipped: why the step was dropped, or None.
        loss: None where it is not known.
    """
    if skipped not in KINDS.values() or not math.isfinite(loss_scale) or loss_scale < 1:
        return False
    return loss is None or math.isfinite(loss)


def _what(layers: tuple[str, ...], record: StepRecord) -> str:
    if not layers and not record.present_P.any():
        return "the loss scaler dropped a step whose gradients were not seen"
    if not layers:
        return f"the total norm is {record.total_norm} while that of every layer is finite"
    if len(layers) == len(record.layers) > 1:
        named = "" if record.culprit is not None else ", gradients cannot name the culprit"
        return f"all {len(layers)} layers hold inf or NaN{named}"
    some = f"{len(layers)} of {len(record.layers)} layers hold inf or NaN"
    if record.culprit is not None and record.culprit.module is not None:
        return some
    return f"{some}, in order {', '.join(layers[:LISTED])}{', ...' if len(layers) > LISTED else ''}"


def _outcome(record: StepRecord, is_shadow: bool) -> str:
    if record.skipped is None:
        return ""
    scale = f" at loss scale {record.loss_scale:g}" if math.isfinite(record.loss_scale) else ""
    if was_dropped(record.skipped, is_applied=not is_shadow):
        return f"; the step was skipped{scale}"
    return f"; the step was taken{scale}, mode: enforce would have skipped it"
