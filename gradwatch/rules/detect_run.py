"""What the run as one shows: its loss scale, and the lengths of its gradients.

`loss_scale_collapse`, `stuck`, `clipped_elsewhere`, `clip_saturated`
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import ClippedElsewhere as ClippedElsewhereConfig
from gradwatch.policy.detectors import ClipSaturated as ClipSaturatedConfig
from gradwatch.policy.detectors import LossScaleCollapse as LossScaleConfig
from gradwatch.policy.detectors import Stuck as StuckConfig
from gradwatch.records import Bools, Float32s, Float64s, Indices
from gradwatch.rules.detect_reading import Reading
from gradwatch.rules.persistent import ALL, Judgement

__all__ = ["ClipSaturated", "ClippedElsewhere", "LossScale", "Repeated"]

ROUNDING = 2e-6
"""Of a norm in float32."""

EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm that it divides by."""

LOOSEST = 1e-4
"""Of a limit so low that the epsilon counts: closer than this no two norms are by chance."""

TURNED = 1e-3
"""By which a tensor's norm must differ, in units of the total, for another gradient."""


def _one(value: bool) -> Bools:
    return np.array([value])


class _Plain:
    """A condition that learns when it judges, and needs no new beginning."""

    def learn(self, reading: Reading, open_S: Bools) -> None:
        """Everything was taken in when it was judged."""

    def begin_anew(self, *, rescales: bool) -> None:
        """Nothing to begin."""

    def restored(self) -> None:
        """Nothing follows from the arrays."""


class LossScale(_Plain):
    """Below 1; or halved, or dropping steps, too often once it was found.

    A scaler begins far too high and halves its scale until a step goes through: that search is
    healthy however long it takes.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self._halved: Float64s = np.zeros(config.window)
        self._dropped: Float64s = np.zeros(config.window)
        self._scale: Float64s = np.full(1, math.nan)
        self._count: Indices = np.zeros(2, dtype=np.intp)  # records, of them since it was found
        self._why = ""

    def judge(self, reading: Reading) -> Judgement | None:
        record, config = reading.record, self._config
        scale, before = record.loss_scale, float(self._scale[0])
        if not math.isfinite(scale) or scale <= 0:
            return None
        dropped = record.skipped in ("overflow", "nonfinite") or not reading.all_finite
        self._scale[0] = scale
        found = self._count[1] > 0 or not dropped
        slot = int(self._count[0]) % config.window
        halvings = math.log2(before / scale) if before > scale and self._count[1] else 0.0
        self._halved[slot] = halvings
        self._dropped[slot] = dropped and found
        self._count += (1, found)
        halved, share = float(self._halved.sum()), float(self._dropped.mean())
        low = scale < config.least
        often = halved >= config.halvings
        many = self._count[1] >= config.window and share > config.share
        self._why = (
            f"it was halved {halved:.0f} times in {config.window} steps"
            if often
            else f"{share:.0%} of the last {config.window} steps were dropped"
            if many
            else f"it is below {config.least:g}"
        )
        hit, calm = low or often or many, not (low or halved > 1 or share > config.share / 2)
        return Judgement(_one(hit), _one(calm), ALL, np.array([scale]), np.array([config.least]))

    def said(self, subject: int, value: float, expected: float) -> str:
        return f"the loss scale is {value:g} and {self._why},"

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {
            "halved": self._halved,
            "dropped": self._dropped,
            "scale": self._scale,
            "count": self._count,
        }


class Repeated(_Plain):
    """Norms that are the same to the bit as in the step before.

    All of them: a total alone may be so because something clips, see `ClippedElsewhere`.
    """

    def __init__(self, config: StuckConfig) -> None:
        self._steps = config.steps

    def judge(self, reading: Reading) -> Judgement | None:
        norm = reading.record.total_norm
        if not math.isfinite(norm):
            return None
        same = reading.stale
        return Judgement(_one(same), _one(not same), ALL, np.array([norm]), np.array([norm]))

    def said(self, subject: int, value: float, expected: float) -> str:
        return f"the norms are the same to the bit, {value:.6g} in all, for {self._steps} steps,"

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {}


class ClippedElsewhere(_Plain):
    """Largest total norms that are the same, of gradients that are not.

    Whoever clips a gradient by its L2 norm leaves what is above the limit at the limit: the total
    comes back digit by digit while its parts do not. Of a gradient that nobody touched they change
    together. A model of one tensor has no parts to tell it by.
    """

    def __init__(self, num_parameters: int, config: ClippedElsewhereConfig) -> None:
        self._total_W: Float64s = np.zeros(config.window)
        self._count: Indices = np.zeros(1, dtype=np.intp)
        self._risen: Bools = np.zeros(1, dtype=np.bool_)
        """Whether a norm has been above the top since the last one at it."""

        self._top: Float64s = np.zeros(1)
        self._top_P: Float32s = np.zeros(num_parameters, dtype=np.float32)
        """The last one at the top, and its tensors."""

        self._steps = config.steps
        self._said = ""

    def judge(self, reading: Reading) -> Judgement | None:
        record = reading.record
        norm = float(record.total_norm)
        if not reading.all_finite or norm <= 0:
            return None
        within = norm * min(ROUNDING + EPSILON / norm, LOOSEST)
        highest = float(self._total_W.max())
        above = norm > highest + within
        self._total_W[int(self._count[0]) % len(self._total_W)] = norm
        self._count[0] += 1
        hit = False
        if norm >= highest - within:
            apart_P = np.abs(record.tensor_norms_P - self._top_P)
            other = apart_P.max(initial=0.0) > TURNED * norm
            hit = bool(other) and abs(norm - float(self._top[0])) <= within
            self._top[0] = norm
            np.copyto(self._top_P, record.tensor_norms_P)
        self._said = _limit(norm, record.loss_scale)
        self._risen[0] = (self._risen[0] or above) and not hit
        return Judgement(
            _one(hit), self._risen.copy(), ALL, np.array([norm]), self._top.copy(),
            begins_anew=above,
        )  # fmt: skip

    def said(self, subject: int, value: float, expected: float) -> str:
        return (
            f"the total norm is {self._said} in {self._steps} steps and never more, while the "
            "layers differ: something clips the gradient before gradwatch measures it (take "
            "clip_grad_norm_, or the trainer's clipping, out of the loop),"
        )

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {
            "total": self._total_W,
            "count": self._count,
            "risen": self._risen,
            "top": self._top,
            "top_tensors": self._top_P,
        }


def _limit(norm: float, loss_scale: float) -> str:
    """The norm, and what it was before it was unscaled where that looks like what people set."""
    scaled = norm * loss_scale
    if not loss_scale > 1 or _is_round(norm) or not _is_round(scaled):
        return f"{norm:.6g}"
    return f"{norm:.6g} ({scaled:.2g} before scaler.unscale_)"


def _is_round(value: float) -> bool:
    return math.isclose(value, float(f"{value:.2g}"), rel_tol=LOOSEST)


class ClipSaturated(_Plain):
    """Nearly every one of the last steps was clipped."""

    def __init__(self, config: ClipSaturatedConfig) -> None:
        self._config = config
        self._clipped: Bools = np.zeros(config.window, dtype=np.bool_)
        self._count: Indices = np.zeros(1, dtype=np.intp)

    def judge(self, reading: Reading) -> Judgement | None:
        record, window = reading.record, self._config.window
        if record.skipped is not None:
            return None
        count = int(self._count[0])
        self._clipped[count % window] = record.clipped
        self._count[0] = count + 1
        if count + 1 < window or not record.limits:
            return None
        share = int(self._clipped.sum()) / window
        hit, calm = share > self._config.share, share < self._config.share - 0.05
        expected = np.array([self._config.share])
        return Judgement(_one(hit), _one(calm), ALL, np.array([share]), expected)

    def said(self, subject: int, value: float, expected: float) -> str:
        return (
            f"{value:.0%} of the last {self._config.window} steps were clipped: the limit sets the "
            "length of each step, not the gradient,"
        )

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"clipped": self._clipped, "count": self._count}
