"""Records and anomalies of a recording in, what they say about the run out. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradwatch.records import Anomaly, Float64s, StepRecord

__all__ = ["FAR", "SMOOTHED", "Findings", "LossStory", "Mover", "find"]

LOOK_BACK = 10
"""Steps before the first alert in which what it is about may have begun."""

USUAL = 100
"""Steps before those that give the usual norms."""

FAR = 4.0
"""A norm that many times its usual one has moved: the bound of the exploding detector."""

SMOOTHED = 20
"""Steps that a loss is averaged over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """A layer whose norm left its usual level."""

    layer: str
    step: int
    """The first step above FAR times `usual`."""

    usual: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStory:
    """Averages over SMOOTHED steps: before the first alert, the worst since, the last."""

    before: float
    worst: float
    end: float

    @property
    def made_good(self) -> float:
        """The share of the rise, in the logarithm, that is gone at the end: 1 is all of it."""
        if not 0 < self.before < self.worst:
            return 1.0
        return math.log(self.worst / self.end) / math.log(self.worst / self.before)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a recording says about its run."""

    num_steps: int
    alerts: tuple[Anomaly, ...]
    """Everything but one-step events, in order; an episode is one."""

    events: tuple[Anomaly, ...]
    clipped: tuple[int, ...]
    """The steps."""

    hardest: StepRecord | None
    """The step with the smallest multiplier, or None where nothing was clipped."""

    skipped: Mapping[str, int]
    """Number of steps by reason."""

    movers: tuple[Mover, ...] = ()
    """In the order in which they moved."""

    usual_total_norm: float = math.nan
    calm_since: int | None = None
    """From this step on the total norm stayed below FAR times its usual one."""

    loss: LossStory | None = None


def find(records: Sequence[StepRecord], anomalies: Iterable[Anomaly]) -> Findings:
    """Reads the whole run; before and after are seen from its first alert."""
    ordered = sorted(anomalies, key=lambda anomaly: anomaly.step)
    alerts = tuple(anomaly for anomaly in ordered if anomaly.level != "event")
    clipped = [record for record in records if record.clipped]
    basics = Findings(
        num_steps=len(records),
        alerts=alerts,
        events=tuple(anomaly for anomaly in ordered if anomaly.level == "event"),
        clipped=tuple(record.step for record in clipped),
        hardest=min(clipped, key=lambda record: record.clip_coef, default=None),
        skipped=Counter(record.skipped for record in records if record.skipped),
    )
    return _with_course(basics, records) if alerts else basics


def _with_course(basics: Findings, records: Sequence[StepRecord]) -> Findings:
    """Adds how things went before and after the first alert."""
    start = max(basics.alerts[0].step - LOOK_BACK, 0)
    before = [r for r in records if start - USUAL <= r.step < start]
    since = [r for r in records if r.step >= start]
    usual = float(_medians([[r.total_norm] for r in before])[0]) if before else math.nan
    return Findings(
        **{
            **vars(basics),
            "movers": _movers(before, since),
            "usual_total_norm": usual,
            "calm_since": _calm_since(since, FAR * usual),
            "loss": _loss_story(before, since),
        }
    )


def _medians(rows: Sequence[Sequence[float]]) -> Float64s:
    """Of each column, over the rows that are finite throughout."""
    table = np.asarray(rows, dtype=np.float64)
    usable = table[np.isfinite(table).all(axis=1)]
    return np.median(usable, axis=0) if len(usable) else np.full(table.shape[1], np.nan)


def _movers(before: Sequence[StepRecord], since: Sequence[StepRecord]) -> tuple[Mover, ...]:
    if not before or not since:
        return ()
    usual_L = _medians([list(record.grad_norms) for record in before])
    norms = np.asarray([record.grad_norms for record in since], dtype=np.float64)  # [steps, L]
    norms[~np.isfinite(norms)] = np.inf
    moved = norms > FAR * usual_L
    movers = [
        Mover(
            layer=since[0].layers[i],
            step=since[int(moved[:, i].argmax())].step,
            usual=float(usual_L[i]),
            worst=float(norms[:, i].max()),
        )
        for i in np.flatnonzero(moved.any(axis=0))
    ]
    return tuple(sorted(movers, key=lambda mover: (mover.step, -mover.worst / mover.usual)))


def _calm_since(since: Sequence[StepRecord], bound: float) -> int | None:
    calm = None
    for record in reversed(since):
        if not record.total_norm < bound:
            break
        calm = record.step
    return calm


def _loss_story(before: Sequence[StepRecord], since: Sequence[StepRecord]) -> LossStory | None:
    old, new = (
        [record.scalars["loss"] for record in part if "loss" in record.scalars]
        for part in (before, since)
    )
    if len(old) < SMOOTHED or len(new) < SMOOTHED:
        return None
    finite = [loss for loss in new if math.isfinite(loss)]
    smooth = np.convolve(finite, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
    if not len(smooth):
        return None
    return LossStory(
        before=float(np.mean(old[-SMOOTHED:])), worst=float(smooth.max()), end=float(smooth[-1])
    )
