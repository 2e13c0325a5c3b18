"""A card and the records from its first abnormal step on in, how it went on out.

    Course(card, records before).take(record) ...  ->  so_far(newest records)  ->  Aftermath

Every number is one of the recording, with the step that it is of; nothing is told of steps that
were not taken in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradwatch.recording.cards import Card
from gradwatch.records import Float32s, Float64s, Layout, StepRecord
from gradwatch.report.course import first_step, rise_before, usual

__all__ = ["BEFORE", "FAR", "FEWEST", "MOST", "NEAR", "RECENT", "Aftermath", "Course", "Peak"]

BEFORE = 128
"""Steps before the first abnormal one that the median of a layer is of, as for the detectors."""

MOST = 2000
"""Steps from the first abnormal one on that are looked at."""

RECENT = 20
"""Steps at the end that medians are of; of the steps before, a card holds as many."""

FEWEST = 5
"""Steps that such a median is of at least."""

FAR, NEAR = 4.0, 2.0
"""Times its median: from FAR on a single step counts as bad, up to NEAR the median of the last
steps as back."""

SAME_RATE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The largest one, and where it was."""

    step: int
    value: float
    layer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aftermath:
    """How it went on since the first abnormal step."""

    first: int
    until: int
    """The steps that were looked at."""

    num_steps: int
    num_clipped: int = 0
    fired: Sequence[str] = ()
    """The rules by which they were clipped."""

    hardest: tuple[int, float, float] | None = None
    """Of the clipped ones that which was made smallest: step, norm before, norm after."""

    num_nonfinite: int = 0
    last_nonfinite: int = -1
    num_skipped: int = 0
    """Of those that were not finite."""

    loss: Peak | None = None
    norm: Peak | None = None
    layer: Peak | None = None
    """Times its median."""

    rate_back: tuple[int, float] | None = None
    """The first step in which a learning rate that had risen was back, and to what."""

    rise_taken: bool = False
    """Whether the step in which it rose was taken, at the raised rate."""

    good_since: int | None = None
    """From this step on the total norm was finite and below FAR times what it was before; None
    where it is not, or nobody looked at all steps."""

    step: int
    """The newest one."""

    num_recent: int
    """Steps behind the card that the medians below are of; none is known where they are few."""

    loss_now: float = math.nan
    norm_now: float = math.nan
    rate_now: float = math.nan
    layers_now: Mapping[str, float] = field(default_factory=dict)
    """Times its median, by layer."""

    batch_norms: Sequence[str] = ()
    """Layers that a forward pass changes statistics of."""

    @property
    def nonfinite_steps(self) -> str:
        """`100 steps from 300 to 399`; empty where there was one at most."""
        if self.num_nonfinite < 2:
            return ""
        return f"{self.num_nonfinite} steps from {self.first} to {self.last_nonfinite}"

    @property
    def still_up(self) -> list[str]:
        """Layers above NEAR times their median at the end, the furthest first."""
        up = [layer for layer, times in self.layers_now.items() if times > NEAR]
        return sorted(up, key=lambda layer: -self.layers_now[layer])


class Course:
    """Takes records one by one, and holds no more than maxima and medians."""

    def __init__(self, card: Card, layout: Layout, before: Iterable[StepRecord]) -> None:
        """
        Args:
            before: the records of up to BEFORE steps before the first abnormal one.
        """
        self.first = self.next = first_step(card)
        self._card, self._layout = card, layout
        earlier = list(before)
        self._medians_L = _medians([record.grad_norms for record in earlier])
        self._usual_norm = usual(card, card.series.get("total_norm", ()))
        self._rise = rise_before(card)
        self._num_steps = self._num_clipped = self._num_nonfinite = self._num_skipped = 0
        self._last_nonfinite = -1
        self._fired: dict[str, None] = {}
        self._hardest: tuple[int, float, float] | None = None
        self._loss: Peak | None = None
        self._norm: Peak | None = None
        self._layer: Peak | None = None
        self._rate_back: tuple[int, float] | None = None
        for record in earlier:
            self._take_rate(record)
        rise = -1 if self._rise is None else self._rise.step
        self._rise_taken = any(one.step == rise and one.skipped is None for one in earlier)
        self._last_bad: int | None = None

    @property
    def is_full(self) -> bool:
        return self.next >= self.first + MOST

    def take(self, record: StepRecord) -> None:
        self.next = record.step + 1
        self._num_steps += 1
        finite = math.isfinite(record.total_norm)
        if not finite:
            self._num_nonfinite += 1
            self._num_skipped += record.skipped is not None
            self._last_nonfinite = record.step
        if not finite or record.total_norm > FAR * self._usual_norm:
            self._last_bad = record.step
        self._loss = _larger(self._loss, record.step, record.scalars.get("loss", math.nan))
        self._norm = _larger(self._norm, record.step, record.total_norm)
        self._take_layers(record)
        if record.clipped:
            self._take_clipped(record)
        self._take_rate(record)

    def _take_rate(self, record: StepRecord) -> None:
        rise, rate = self._rise, record.learning_rate
        if rise is None or self._rate_back is not None or record.step <= rise.step:
            return
        if 0 < rate <= SAME_RATE * rise.before:
            self._rate_back = record.step, rate

    def _take_layers(self, record: StepRecord) -> None:
        if not len(self._medians_L):
            return
        times_L = self._times(record.grad_norms)
        times_L[~np.isfinite(times_L)] = -1.0
        worst = int(times_L.argmax())
        layer = record.layers[worst]
        self._layer = _larger(self._layer, record.step, float(times_L[worst]), layer)

    def _take_clipped(self, record: StepRecord) -> None:
        self._num_clipped += 1
        self._fired |= dict.fromkeys(record.fired)
        before, after = record.total_norm, record.total_norm_clipped
        if math.isfinite(before) and before > 0:
            hardest = self._hardest
            if hardest is None or after / before < hardest[2] / hardest[1]:
                self._hardest = record.step, before, after

    def _times(self, norms_L: Float32s | Float64s) -> Float64s:
        with np.errstate(all="ignore"):
            times_L: Float64s = np.asarray(norms_L, dtype=np.float64) / self._medians_L
        return times_L

    def so_far(self, recent: Sequence[StepRecord]) -> Aftermath | None:
        """
        Args:
            recent: the newest records, oldest first.
        """
        if not recent or not self._num_steps:
            return None
        newest = [one for one in recent if one.step > self._card.step][-RECENT:]
        all_seen = not self.is_full
        good = None if self._last_bad is None else self._last_bad + 1
        return Aftermath(
            first=self.first,
            until=self.next - 1,
            num_steps=self._num_steps,
            num_clipped=self._num_clipped,
            fired=tuple(self._fired),
            hardest=self._hardest,
            num_nonfinite=self._num_nonfinite,
            last_nonfinite=self._last_nonfinite,
            num_skipped=self._num_skipped,
            loss=self._loss,
            norm=self._norm,
            layer=self._layer,
            rate_back=self._rate_back,
            rise_taken=self._rise_taken,
            good_since=good if all_seen and good is not None and good < self.next else None,
            step=recent[-1].step,
            num_recent=len(newest),
            loss_now=_median([one.scalars.get("loss", math.nan) for one in newest]),
            norm_now=_median([one.total_norm for one in newest]),
            rate_now=newest[-1].learning_rate if newest else math.nan,
            layers_now=self._layers_now(newest),
            batch_norms=_batch_norms(self._layout),
        )

    def _layers_now(self, newest: Sequence[StepRecord]) -> dict[str, float]:
        medians_L = _medians([one.grad_norms for one in newest])
        if not len(medians_L) or not len(self._medians_L):
            return {}
        times_L = self._times(medians_L)
        return {
            layer: float(times)
            for layer, times in zip(self._layout.layers, times_L, strict=False)
            if math.isfinite(times)
        }


def _larger(peak: Peak | None, step: int, value: float, layer: str = "") -> Peak | None:
    if not math.isfinite(value) or value < 0 or (peak is not None and value <= peak.value):
        return peak
    return Peak(step=step, value=value, layer=layer)


def _median(values: Sequence[float]) -> float:
    """NaN where few are known."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if len(known) >= FEWEST else math.nan


def _medians(rows: Sequence[Float32s]) -> Float64s:
    """Of each layer [L], over the rows that are finite throughout; empty where they are few."""
    table = np.asarray(rows, dtype=np.float64)
    usable = table[np.isfinite(table).all(axis=1)] if len(rows) else table
    return np.median(usable, axis=0) if len(usable) >= FEWEST else np.empty(0)


def _batch_norms(layout: Layout) -> tuple[str, ...]:
    found = {
        layout.layers[place]: None
        for parameter, place in zip(layout.parameters, layout.layer_of, strict=True)
        if "BatchNorm" in parameter.module
    }
    return tuple(found)
