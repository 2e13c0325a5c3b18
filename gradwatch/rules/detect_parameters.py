"""`collapsed` and `unused`: what single parameters show, where a layer's norm hides it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import Collapsed as CollapsedConfig
from gradwatch.policy.detectors import Unused as UnusedConfig
from gradwatch.records import Bools, Float64s, Layout
from gradwatch.rules.baseline import Band, Baseline, band_of
from gradwatch.rules.detect_loss import loss_of
from gradwatch.rules.detect_reading import LEAST, Reading
from gradwatch.rules.persistent import Judgement

__all__ = ["Collapsed", "Unused"]

ALIKE = math.log(10.0)
"""A norm that falls no further than ten times as much as the loss falls with it."""

LOSS = Band(z=1e9, times=1e9, floor=0.02, warmup=8, window=128)
"""For the median alone."""


class Collapsed:
    """ln(norm) of each parameter below its own baseline, and more so than the loss."""

    def __init__(self, num_parameters: int, config: CollapsedConfig) -> None:
        self._baseline = Baseline(num_parameters, band_of(config))
        self._loss = Baseline(1, LOSS)
        self._y_P: Float64s = np.empty(0)
        """ln(norm) of the record that is judged."""

    def judge(self, reading: Reading) -> Judgement | None:
        norms_P = reading.record.tensor_norms_P.astype(np.float64)
        self._y_P = y_P = np.log(np.maximum(norms_P, LEAST))
        baseline = self._baseline
        judged_P = np.isfinite(norms_P) & reading.record.present_P
        hit_P = y_P < baseline.low_L
        if np.count_nonzero(hit_P):
            hit_P &= baseline.center_L - y_P > self._fall_of_loss(reading) + ALIKE
        return Judgement(
            hit_P, y_P > baseline.calm_low_L, judged_P, norms_P, baseline.median_L
        )  # fmt: skip

    def _fall_of_loss(self, reading: Reading) -> float:
        """By how much ln(loss) is below its median; 0 where that is not known."""
        loss, usual = loss_of(reading), float(self._loss.center_L[0])
        if reading.record.scalars.get("loss") == 0.0:
            return math.inf
        return 0.0 if loss is None or math.isnan(usual) else max(0.0, usual - math.log(loss))

    def learn(self, reading: Reading, open_S: Bools) -> None:
        if reading.learns and not reading.stale:
            norms_P = reading.record.tensor_norms_P
            accepted_P = (norms_P > 0) & np.isfinite(norms_P) & reading.record.present_P & ~open_S
            everyone = np.count_nonzero(accepted_P) == len(accepted_P)
            self._baseline.accept(self._y_P, None if everyone else accepted_P)
            loss = loss_of(reading)
            if loss is not None and not np.count_nonzero(open_S):
                self._loss.accept(np.array([math.log(loss)]))
                self._loss.end_record()
        self._baseline.end_record()

    def begin_anew(self, *, rescales: bool) -> None:
        self._baseline.begin_anew(wary=rescales)

    def said(self, subject: int, value: float, expected: float) -> str:
        return f"gradient norm {value:.3g} is {value / expected:.2g}x its median {expected:.3g}"

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        loss = {f"loss_{name}": array for name, array in self._loss.arrays().items()}
        return {**self._baseline.arrays(), **loss}

    def restored(self) -> None:
        self._baseline.restored()
        self._loss.restored()


class Unused:
    """Parameters that are to be trained and have had no gradient."""

    def __init__(self, layout: Layout, config: UnusedConfig) -> None:
        self._trainable_P = np.array([p.trainable for p in layout.parameters], dtype=np.bool_)
        self._steps = config.steps
        self._ones_P: Float64s = np.ones(len(layout.parameters))

    def judge(self, reading: Reading) -> Judgement | None:
        if reading.record.skipped is not None and not reading.record.present_P.any():
            return None  # a step that nobody has seen
        absent_P = ~reading.record.present_P
        return Judgement(
            absent_P, reading.record.present_P, self._trainable_P, self._ones_P, self._ones_P
        )

    def learn(self, reading: Reading, open_S: Bools) -> None:
        """There is nothing to learn."""

    def begin_anew(self, *, rescales: bool) -> None:
        """Nothing to begin."""

    def said(self, subject: int, value: float, expected: float) -> str:
        return f"no gradient in {self._steps} steps,"

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {}

    def restored(self) -> None:
        """Nothing follows from the arrays."""
