"""Records in, running totals out: what a scrape may ask for at any moment.

    StepRecord, StepRecord, ...  ->  Tally  ->  Snapshot, a copy that nobody changes

One thread adds records; any thread may take a snapshot. Totals go by the names of the metrics
that show them, so a name here without a metric, or the other way round, fails a test.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from gradwatch.records import POLICY, Anomaly, Float32s, Level, RunInfo, Status, StepRecord

__all__ = [
    "COMPONENTS",
    "NORM_BUCKETS",
    "STATES",
    "STEP_SECONDS_BUCKETS",
    "Exemplar",
    "Histogram",
    "Labels",
    "Snapshot",
    "Tally",
]

COMPONENTS = ("measure", "apply", "readback", "detection", "recording", "export", "callback")
"""The parts of gradwatch that may fail without the others."""

STATES = ("running", "finished", "stopped", "crashed")

NORM_BUCKETS = tuple(float(f"{m}e{e}") for e in range(-4, 9) for m in (1, 3))[:25]
"""Half-decades from 1e-4 to 1e8."""

STEP_SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

WINDOW_SECONDS = 60
NOTHING = np.empty(0, dtype=np.float32)

Labels = tuple[str, ...]
"""Label values beside `run` and `rank`, in the order that the metric gives them."""


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One observation of a bucket, to find the step again."""

    step: int
    value: float
    time: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by bucket; the last bucket is what exceeds every bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than `bounds`, each bucket for itself."""

    sum: float
    exemplars: tuple[Exemplar | None, ...]
    """The newest one of each bucket."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The totals at one moment, all of the same records. A value not known yet is absent."""

    info: RunInfo
    state: str
    numbers: Mapping[str, float]
    """By metric, where it has no labels of its own."""

    labelled: Mapping[str, Mapping[Labels, float]]
    """By metric and labels."""

    histograms: Mapping[str, Histogram]
    grad_norms: Float32s
    """[L] of the last record, empty before the first; as is `coefs`."""

    coefs: Float32s
    update_ratios: Float32s
    """[L] of the last record that was sampled, empty before it."""

    active: Mapping[str, tuple[str, ...]]
    """Kinds with an open ALERT episode, each with its layers, worst first."""


class Tally:
    """The running totals of one run."""

    def __init__(
        self, info: RunInfo, *, kinds: Sequence[str], clock: Callable[[], float] = time.time
    ) -> None:
        self.info = info
        self.largest_norm = math.nan
        """Of all finite total norms so far; NaN before the first."""

        self._clock = clock
        self._lock = threading.Lock()
        self._state = "running"
        self._latest: StepRecord | None = None
        self._update_ratios = NOTHING
        self._active: Mapping[str, tuple[str, ...]] = {}
        self._window: deque[tuple[int, float]] = deque()
        self._numbers: dict[str, float] = dict.fromkeys(_COUNTED, 0)
        self._labelled = _labelled(info, kinds)
        self._buckets = {
            "total_norm_distribution": _Buckets(NORM_BUCKETS),
            "step_duration_seconds": _Buckets(STEP_SECONDS_BUCKETS),
        }

    def add(self, record: StepRecord) -> None:
        """Counts one record; called by one thread, in the order of the steps."""
        with self._lock:
            self._count(record)
            self._observe(record)
            self._note_events(record)
            self._remember(record)

    def amend(self, record: StepRecord) -> None:
        """A record that was counted already, with what was logged and sampled since."""
        with self._lock:
            self._remember(record)

    def note(self, anomaly: Anomaly) -> None:
        """Counts a finding that came without a record."""
        with self._lock:
            _increment(self._labelled["events_total"], anomaly.kind, anomaly.level)

    def hook_error(self, component: str) -> None:
        """Counts an error of gradwatch itself, in one of `COMPONENTS`."""
        with self._lock:
            _increment(self._labelled["hook_errors_total"], component)

    def set_enforcing(self, enforcing: bool) -> None:
        """Whether the policy's decisions are applied."""
        with self._lock:
            self._numbers["enforcing"] = int(enforcing)

    def set_info(self, info: RunInfo) -> None:
        """The run goes on under another policy, with the same rules and layers."""
        with self._lock:
            self.info = info

    def set_state(self, state: str) -> None:
        """One of `STATES`.

        Raises:
            ValueError: it is none of them.
        """
        if state not in STATES:
            raise ValueError(f"the state of a run is one of {STATES}. Received: {state!r}")
        with self._lock:
            self._state = state
            self._labelled["run_state"] = {(name,): int(name == state) for name in STATES}

    def last_events(self) -> dict[str, float]:
        """Unix time of the last step of an ALERT episode, by kind; 0 where there was none."""
        with self._lock:
            times = self._labelled["last_event_timestamp_seconds"]
            return {kind: time for (kind,), time in times.items()}

    def set_records_dropped(self, count: int) -> None:
        """Steps so far that the recorder could not keep up with."""
        with self._lock:
            self._numbers["records_dropped_total"] = count

    def set_recording_bytes(self, size: int) -> None:
        with self._lock:
            self._numbers["recording_bytes"] = size

    def status(self) -> Status:
        """What no record tells."""
        with self._lock:
            return Status(
                enforcing=bool(self._numbers["enforcing"]),
                records_dropped=int(self._numbers["records_dropped_total"]),
                hook_errors={
                    component: int(count)
                    for (component,), count in self._labelled["hook_errors_total"].items()
                },
            )

    def set_status(self, status: Status | None) -> None:
        """What no record tells; None where nobody knows, and then it is absent."""
        with self._lock:
            for name in ("enforcing", "records_dropped_total"):
                self._numbers.pop(name, None)
            self._labelled["hook_errors_total"] = {}
            if status is not None:
                self._numbers["enforcing"] = int(status.enforcing)
                self._numbers["records_dropped_total"] = status.records_dropped
                errors = dict.fromkeys(COMPONENTS, 0) | dict(status.hook_errors)
                self._labelled["hook_errors_total"] = {(name,): n for name, n in errors.items()}

    def set_active(self, active: Mapping[str, tuple[str, ...]]) -> None:
        """Every kind with an open ALERT episode, each with its layers, worst first."""
        with self._lock:
            self._active = dict(active)
            for name in ("anomaly_active", "anomalous_layers"):
                self._labelled[name] = dict.fromkeys(self._labelled[name], 0)
            for kind, layers in active.items():
                self._labelled["anomaly_active"][kind,] = 1
                self._labelled["anomalous_layers"][kind,] = len(layers)

    def snapshot(self) -> Snapshot:
        """Everything as of now. The lock is held for copying alone."""
        with self._lock:
            latest = self._latest
            numbers = self._numbers | self._window_max()
            labelled = {name: values.copy() for name, values in self._labelled.items()}
            histograms = {name: buckets.frozen() for name, buckets in self._buckets.items()}
            active, state, info = self._active, self._state, self.info
            ratios = self._update_ratios
        with np.errstate(over="ignore"):
            norms = NOTHING if latest is None else latest.grad_norms
            coefs = NOTHING if latest is None else latest.coefs
        return Snapshot(
            info=info,
            state=state,
            numbers=numbers,
            labelled=labelled,
            histograms=histograms,
            grad_norms=norms,
            coefs=coefs,
            update_ratios=ratios,
            active=active,
        )

    def _count(self, record: StepRecord) -> None:
        numbers = self._numbers
        # A record that was dropped was a step all the same.
        before = record.step - 1 if self._latest is None else self._latest.step
        numbers["steps_total"] += max(1, record.step - before)
        numbers["micro_batches_total"] += record.micro_batches
        numbers["overhead_seconds_total"] += record.overhead_seconds
        for rule in record.fired if record.clipped else ():
            if rule in self.info.multiplying:
                _increment(self._labelled["clipped_steps_total"], rule)
        if record.skipped is not None:
            _increment(self._labelled["skipped_steps_total"], record.skipped)

    def _remember(self, record: StepRecord) -> None:
        self._numbers.update(
            step=record.step,
            accumulation_steps=record.micro_batches,
            total_norm=float(record.total_norm),
            total_norm_clipped=float(record.total_norm_clipped),
            last_step_timestamp_seconds=float(record.time),
        )
        if "loss" in record.scalars:
            self._numbers["loss"] = float(record.scalars["loss"])
        for name in ("loss_scale", "learning_rate", "noise_scale", "local_norm"):
            value = float(getattr(record, name))
            if not math.isnan(value):
                self._numbers[name] = value
        limits = self._labelled["limit"]
        limits.update({(rule,): float(limit) for rule, limit in record.limits.items()})
        if record.samples:
            self._update_ratios = record.update_ratios
        self._latest = record

    def _observe(self, record: StepRecord) -> None:
        norm, duration = float(record.total_norm), float(record.duration_seconds)
        if math.isfinite(norm):
            exemplar = Exemplar(record.step, norm, float(record.time))
            self._buckets["total_norm_distribution"].add(norm, exemplar)
            self._widen_window(norm, int(record.time))
            self.largest_norm = max(norm, self.largest_norm)
        if math.isfinite(duration):
            self._buckets["step_duration_seconds"].add(duration)

    def _note_events(self, record: StepRecord) -> None:
        latest = self._labelled["last_event_timestamp_seconds"]
        alerts = {anomaly.kind for anomaly in record.anomalies if anomaly.level == "alert"}
        for kind in alerts.union(self._active):
            latest[kind,] = max(latest.get((kind,), 0.0), float(record.time))
        for anomaly in record.anomalies:
            _increment(self._labelled["events_total"], anomaly.kind, anomaly.level)

    def _widen_window(self, norm: float, second: int) -> None:
        """Keeps the maximum of each second whose maximum no later second exceeds."""
        window = self._window
        while window and (window[-1][1] <= norm or window[-1][0] >= second):
            kept_second, kept_norm = window.pop()
            second, norm = max(second, kept_second), max(norm, kept_norm)
        window.append((second, norm))

    def _window_max(self) -> dict[str, float]:
        """The newest second stays, however old: a step may take longer than the window."""
        oldest = self._clock() - WINDOW_SECONDS - 1
        while len(self._window) > 1 and self._window[0][0] < oldest:
            self._window.popleft()
        return {"total_norm_window_max": self._window[0][1]} if self._window else {}


class _Buckets:
    """A histogram that grows."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: list[Exemplar | None] = [None] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, exemplar: Exemplar | None = None) -> None:
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._exemplars[bucket] = exemplar
        self._sum += value

    def frozen(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum, tuple(self._exemplars))


_COUNTED = (
    "steps_total",
    "micro_batches_total",
    "overhead_seconds_total",
    "records_dropped_total",
    "recording_bytes",
    "enforcing",
    "last_step_timestamp_seconds",
)
"""What is 0 before the first step. Other numbers are unknown until then, and absent."""


def _labelled(info: RunInfo, kinds: Sequence[str]) -> dict[str, dict[Labels, float]]:
    """Every label set that is known beforehand: increase() misses what is born above 0."""
    return {
        "clipped_steps_total": {(rule,): 0 for rule in info.multiplying},
        "skipped_steps_total": {(reason,): 0 for reason in info.reasons},
        "events_total": {
            (kind, level): 0 for kind in (*kinds, POLICY) for level in get_args(Level)
        },
        "last_event_timestamp_seconds": {(kind,): 0 for kind in kinds},
        "anomaly_active": {(kind,): 0 for kind in kinds},
        "anomalous_layers": {(kind,): 0 for kind in kinds},
        "limit": {},
        "hook_errors_total": {(component,): 0 for component in COMPONENTS},
        "run_state": {(state,): int(state == "running") for state in STATES},
    }


def _increment(totals: dict[Labels, float], *labels: str) -> None:
    totals[labels] = totals.get(labels, 0) + 1
