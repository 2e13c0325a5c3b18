"""Healthy runs in, thresholds out, each with the false alarms that are to be expected of it.

    records -> every detector at every rung of its ladder -> findings -> the rung that is kept

A ladder goes from strict to tolerant. What is kept is one rung above the strictest one from which
on no healthy run raises a finding, so that a run a little rougher than these does not either; but
no rung above the default where that finds nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwatch.policy import KINDS, Detect
from gradwatch.records import Layout, StepRecord
from gradwatch.rules.detection import Detection
from gradwatch.rules.guard import OVERFLOW

__all__ = ["LADDERS", "RunFindings", "Tuned", "observed", "tuned"]

Rung = Mapping[str, float]

LADDERS: Mapping[str, tuple[Rung, ...]] = {
    "exploding": tuple(
        {"z": z, "times": times}
        for z, times in ((4, 2.5), (5, 3.2), (6, 4), (8, 6), (10, 10), (14, 20), (20, 50))
    ),
    "loss_spike": tuple(
        {"z": z, "times": times}
        for z, times in ((3, 1.07), (4, 1.1), (5, 1.15), (6, 1.25), (8, 1.5), (12, 2))
    ),
    "collapsed": tuple(
        {"z": z, "times": times}
        for z, times in ((5, 30), (6, 100), (8, 300), (10, 1000), (14, 10000))
    ),
    "diverging": tuple({"times": times} for times in (1.15, 1.25, 1.4, 1.7, 2.5, 4)),
    "vanishing": tuple({"share": share} for share in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10)),
    "dead": tuple({"share": share} for share in (0.99, 0.999, 0.9999, 0.99999)),
    "stalled_update": tuple({"ratio": ratio} for ratio in (1e-6, 1e-7, 1e-8, 1e-9, 1e-10)),
    "oversized_update": tuple({"ratio": ratio} for ratio in (0.15, 0.3, 0.5, 1, 2, 5)),
    "underflow": tuple({"share": share} for share in (0.2, 0.3, 0.4, 0.55, 0.7, 0.9)),
    "swallowed_update": tuple({"share": share} for share in (0.4, 0.5, 0.6, 0.75, 0.9)),
    "loss_scale_collapse": tuple({"share": share} for share in (0.15, 0.25, 0.4, 0.6, 0.8)),
    "unused": tuple({"steps": steps} for steps in (50, 100, 300, 1000, 3000)),
}
"""By kind, from strict to tolerant. The default of each is one of its rungs, never the first."""


@dataclass(slots=True)
class RunFindings:
    """What each rung of each ladder finds in one run."""

    name: str
    steps: int = 0
    found: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Warnings and alerts by kind and rung."""

    unhealthy: str = ""
    """Why the run is none to tune on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """One kind's threshold."""

    kind: str
    rung: Rung | None
    """None where even the most tolerant one finds something."""

    default: Rung
    by_default: int
    """Findings of the default over all runs."""

    elsewhere: int | None
    """Findings in each run of what is kept without that run; None of a single run."""

    blamed: str = ""
    """Where there is no rung: a run that each of them finds something in."""


def observed(
    name: str, layout: Layout, records: Iterable[StepRecord], base: Detect | None = None
) -> RunFindings:
    """Goes through a run once, with every rung of every ladder.

    Args:
        base: what the ladders do not change, such as the selection of layers; kinds that it
            switches off are left out.
    """
    base = base or Detect()
    ladders = {
        (kind, i): Detection(layout, _only(base, kind, rung))
        for kind, rungs in LADDERS.items()
        if base[kind] is not None
        for i, rung in enumerate(rungs)
    }
    run = RunFindings(name)
    for record in records:
        run.steps += 1
        for key, detection in ladders.items():
            run.found[key] += sum(a.level != "event" for a in detection.observe(record))
        # Not by what was found: the run may not have looked for it. A scaler drops steps by design.
        if not (run.unhealthy or math.isfinite(record.total_norm) or record.skipped == OVERFLOW):
            run.unhealthy = f"step {record.step} was not finite"
    return run


def tuned(runs: Sequence[RunFindings], base: Detect | None = None) -> list[Tuned]:
    """What is kept of each kind, most urgent first."""
    base = base or Detect()
    return [_tuned(kind, runs) for kind in KINDS if kind in LADDERS and base[kind] is not None]


def _only(base: Detect, kind: str, rung: Rung) -> Detect:
    """One detector at one rung, and no other."""
    detector = base[kind]
    assert detector is not None
    values: dict[str, Any] = dict.fromkeys(KINDS)
    values[kind] = detector.model_copy(update=dict(rung))
    return base.model_copy(update=values)


def _tuned(kind: str, runs: Sequence[RunFindings]) -> Tuned:
    rungs = LADDERS[kind]
    default = default_rung(kind)
    kept = _kept(kind, runs)
    elsewhere = None
    if len(runs) > 1:
        elsewhere = sum(
            run.found[kind, len(rungs) - 1 if rung is None else rung]
            for i, run in enumerate(runs)
            for rung in (_kept(kind, [*runs[:i], *runs[i + 1 :]]),)
        )
    last = len(rungs) - 1
    blamed = next((run.name for run in runs if run.found[kind, last]), "")
    return Tuned(
        kind=kind,
        rung=None if kept is None else rungs[kept],
        default=rungs[default],
        by_default=sum(run.found[kind, default] for run in runs),
        elsewhere=elsewhere,
        blamed=blamed if kept is None else "",
    )


def _kept(kind: str, runs: Sequence[RunFindings]) -> int | None:
    """The place of the rung that is kept; None where each of them finds something."""
    last = len(LADDERS[kind]) - 1
    noisy = [i for i in range(last + 1) if any(run.found[kind, i] for run in runs)]
    strictest, default = max(noisy, default=-1) + 1, default_rung(kind)
    if strictest > last:
        return None
    return min(strictest + 1, default if strictest <= default else last)


def default_rung(kind: str) -> int:
    """Which rung of its ladder a kind has by default."""
    detector = Detect()[kind]
    return next(
        i
        for i, rung in enumerate(LADDERS[kind])
        if all(getattr(detector, key) == value for key, value in rung.items())
    )
