"""A recording in, a limit and a number of micro-batches out, each with its reason.

    total norms -> healthy ones -> limits that are tried on them -> the first that spares them

Advice is never applied by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import yaml

from gradwatch.policy import StatisticLimit
from gradwatch.records import Float64s, RunInfo, StepRecord
from gradwatch.rules.arrays import NUMBERS
from gradwatch.rules.statistics import begun, bounds, learned

__all__ = ["Advice", "Point", "advise"]

SPARED = 0.01
"""Share of healthy steps that a limit may clip."""

ZS = (4.0, 5.0, 6.0, 8.0)
HEADROOM = 2.0
"""Times the 99th percentile: the absolute bound beside a limit that learns."""

LATENCY = 5
"""Steps that an alert may have lasted when it is raised."""

ENOUGH = 200
"""Steps: twice the warm-up of a limit that learns."""

UNUSUAL_Z = 6.0
"""Beyond it a step is no part of what a healthy run looks like, as for the detectors."""

BLOCK = 100
SHIFT = 2.0
"""Times: neighbouring blocks whose medians are that far apart."""

HEAVY = 0.35
"""Deviation of ln(norm) about its level; 0.1 to 0.2 is what language models have."""

SATURATED = 0.9
FEW = 200
MOST_LISTED = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One piece of advice."""

    what: str
    why: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    limit: Point
    policy: str
    """The lines to paste, YAML."""

    share_clipped: float
    """Of the healthy steps, by those lines; NaN where nothing is known."""

    percentile: float
    """The 99th of the norms of healthy steps."""

    warnings: tuple[Point, ...]
    accumulation: Point


@dataclass(frozen=True, slots=True)
class _Norms:
    """The finite total norms [T] of a run, in order."""

    steps: Float64s
    values: Float64s
    healthy: Float64s
    """Of the steps that were not unusual."""

    usual_T: np.ndarray
    warmup: int


def advise(records: Iterable[StepRecord], info: RunInfo) -> Advice:
    """What the recorded norms advise; reads them once."""
    whole = list(records)
    listed, unwell = _before_the_first_alert(whole)
    norms = _norms(listed)
    warnings = (*unwell, *_warnings(listed, whole[len(listed) :], norms, info))
    accumulation = _accumulation(listed)
    if len(norms.healthy) == 0:
        nothing = Point("no limit", "the recording holds no step with a finite norm above 0")
        return Advice(limit=nothing, policy="", share_clipped=math.nan, percentile=math.nan,
                      warnings=warnings, accumulation=accumulation)  # fmt: skip
    p99 = float(np.quantile(norms.healthy, 0.99))
    statistic, share = _spared(norms, p99)
    rule = {"limit": statistic.written(), "name": "advised"}
    return Advice(
        limit=_limit_point(statistic, share, p99, norms),
        policy=_pasted(rule),
        share_clipped=share,
        percentile=p99,
        warnings=warnings,
        accumulation=accumulation,
    )


def _before_the_first_alert(
    records: list[StepRecord],
) -> tuple[list[StepRecord], tuple[Point, ...]]:
    """The steps in which the run was well, where they are enough to learn from."""
    alerts = [
        (record.step, anomaly.kind)
        for record in records
        for anomaly in record.anomalies
        if anomaly.level == "alert"
    ]
    if not alerts:
        return records, ()
    step, kind = alerts[0]
    well = [record for record in records if record.step < step - LATENCY]
    is_enough = len(well) >= ENOUGH
    of = (
        f"the {len(well)} steps before it"
        if is_enough
        else "all of its steps, since few of them are before it"
    )
    point = Point(
        f"this run was not well: {kind} at step {step}",
        f"the advice is of {of}. Better take a run that went through",
    )
    return (well if is_enough else records), (point,)


def _norms(records: list[StepRecord]) -> _Norms:
    kept = [r for r in records if math.isfinite(r.total_norm) and r.total_norm > 0]
    values = np.array([record.total_norm for record in kept], dtype=np.float64)
    steps = np.array([record.step for record in kept], dtype=np.float64)
    warmup = min(BLOCK, max(1, len(values) // 4))
    limits = _limits(StatisticLimit(z=UNUSUAL_Z, warmup=warmup, floor=0.25), values)
    usual = values <= limits
    usual[:warmup] = values[:warmup] <= 10 * np.median(values[:warmup]) if len(values) else True
    return _Norms(steps, values, values[usual], usual, warmup)


def _limits(statistic: StatisticLimit, values: Float64s) -> Float64s:
    """[T] the limit that each step is held to."""
    state, limits = begun(statistic, 1, NUMBERS), []
    for value in values.tolist():
        found = bounds(statistic, state, NUMBERS)
        state = learned(statistic, state, found, value, True, NUMBERS)
        limits.append(found.limit_U)
    return np.array(limits, dtype=np.float64)


def _spared(norms: _Norms, p99: float) -> tuple[StatisticLimit, float]:
    """The tightest limit that clips hardly any healthy step, and the share that it clips."""
    early = norms.values[: norms.warmup]
    most, until = _rounded(HEADROOM * p99), _rounded(HEADROOM * float(np.quantile(early, 0.99)))
    for z in ZS:
        statistic = StatisticLimit(z=z, max=most, until=max(most, until))
        over = norms.values > _limits(statistic, norms.values)
        share = float(over[norms.usual_T].mean())
        if share <= SPARED:
            break
    return statistic, share


def _rounded(value: float) -> float:
    """Up, to two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _limit_point(statistic: StatisticLimit, share: float, p99: float, norms: _Norms) -> Point:
    median = float(np.median(norms.healthy))
    return Point(
        f"clip at {statistic.z:g} deviations of ln(norm) above its level, never above "
        f"{statistic.max:g}: {share:.2%} of the {len(norms.healthy)} healthy steps would be "
        "clipped",
        f"healthy norms have their median at {median:.4g} and their 99th percentile at {p99:.4g}. "
        f"The level is followed, so the limit keeps up with training; {statistic.max:g} is twice "
        "that percentile and holds what the level cannot: heavy tails. While the first "
        f"{statistic.warmup} steps warm it up, {statistic.until:g} holds",
        "docs/policy.md, the default adaptive limit: 0.01 % false clips over 20 traces",
    )


def _pasted(rule: Mapping[str, object]) -> str:
    return yaml.safe_dump({"clip": [rule]}, sort_keys=False)


def _warnings(
    records: list[StepRecord], later: list[StepRecord], norms: _Norms, info: RunInfo
) -> Iterator[Point]:
    if len(norms.values) < FEW:
        yield Point(
            f"only {len(norms.values)} usable steps",
            f"quantiles of fewer than {FEW} say little: record more before you rely on this",
        )
    if bad := [record.step for record in records if not math.isfinite(record.total_norm)]:
        yield Point(
            f"{len(bad)} steps were not finite, first step {bad[0]}",
            "no limit is the answer to those: guard.nonfinite: skip drops them whole",
        )
    yield from _warnings_of_policy(records, later, info)
    yield from _warnings_of_norms(norms)


def _warnings_of_policy(
    records: list[StepRecord], later: list[StepRecord], info: RunInfo
) -> Iterator[Point]:
    if not info.multiplying or not records:
        return
    steps = "steps before the alert" if later else "steps"
    clipped_later = sum(record.clipped for record in later)
    share = sum(record.clipped for record in records) / len(records)
    if share > SATURATED:
        yield Point(
            f"saturated: {share:.0%} of the {steps} were clipped",
            "a limit below the usual norm makes every update the same length: it acts as a second "
            "learning rate, and no longer as a guard. Raise it, or lower the learning rate",
            "Pascanu et al., arXiv:1211.5063: the threshold is chosen from the average norm",
        )
    elif share == 0 and clipped_later:
        yield Point(
            f"clips no healthy step: none of the {len(records)} {steps} was clipped, "
            f"{clipped_later} later ones were",
            "its limit is above everything that came while the run was well; one nearer to the "
            "usual norm would catch an explosion sooner",
        )
    elif share == 0:
        yield Point(
            "never clips: no step of this run was clipped",
            "its limit is above everything that came; it would still catch an explosion, but one "
            "nearer to the usual norm would catch it sooner",
        )


def _warnings_of_norms(norms: _Norms) -> Iterator[Point]:
    logs = np.log(norms.values)
    whole = len(logs) // BLOCK * BLOCK
    if whole == 0:
        return
    blocks = logs[:whole].reshape(-1, BLOCK)
    medians = np.median(blocks, axis=1)
    deviation = float(1.4826 * np.median(np.abs(blocks - medians[:, None])))
    if deviation > HEAVY:
        yield Point(
            f"heavy-tailed: ln(norm) deviates by {deviation:.2f} about its level",
            f"4 deviations are a factor of {math.exp(4 * deviation):.0f}, so the absolute max of "
            "the advised rule does most of the work. Larger batches make norms steadier",
        )
    jumps = np.flatnonzero(np.abs(np.diff(medians)) > math.log(SHIFT)) + 1
    if len(jumps):
        at = ", ".join(str(int(norms.steps[block * BLOCK])) for block in jumps[:MOST_LISTED])
        more = f" and {len(jumps) - MOST_LISTED} more" if len(jumps) > MOST_LISTED else ""
        yield Point(
            f"level shifts by more than {SHIFT:g} times near step {at}{more}",
            "no fixed number fits both levels; a limit that learns follows within some 20 steps. "
            "The first shift of a run is usually its warm-up",
        )


def _accumulation(records: list[StepRecord]) -> Point:
    source = "McCandlish et al., arXiv:1812.06162: B_simple"
    known = [r for r in records if math.isfinite(r.noise_scale)]
    if not known:
        return Point(
            "accumulation: not known",
            "the noise scale was not measured: it takes a policy with `accumulate` and windows of "
            "2 micro-batches or more",
            source,
        )
    newest = known[-max(1, len(known) // 4) :]
    scale = float(np.median([record.noise_scale for record in newest]))
    per_micro = float(np.median([r.weight / max(1, r.micro_batches) for r in newest]))
    now = float(np.median([record.micro_batches for record in newest]))
    steps = max(1, round(scale / per_micro))
    unit = "micro-batches" if per_micro == 1 else f"samples, {per_micro:g} to a micro-batch"
    return Point(
        f"accumulate: {{steps: {steps}}} (now {now:g})",
        f"the noise scale is {scale:.3g} {unit}: at that batch size noise and signal of the "
        "gradient are equal. Far more micro-batches buy little, far fewer leave steps noisy",
        source,
    )
