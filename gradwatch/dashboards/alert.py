"""What an alert is made of, and the PromQL that several of them share.

Every expression keeps to Prometheus 2.42 and ends in one series per run, however many ranks it
has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "IN_RECORDING",
    "THRESHOLDS",
    "Alert",
    "Recording",
    "Severity",
    "Thresholds",
    "counted",
    "duration",
    "happened",
    "how_many",
    "kinds",
    "now",
    "which",
    "words",
]

IN_RECORDING = "none in what was scraped, `gradwatch report RECORDING` has them"
"""What is said where an event passed between two scrapes."""

Severity = Literal["critical", "warning", "info"]
"""critical: a human is needed now. warning: worth a look today. info: worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What the rules compare with, in seconds unless said otherwise."""

    event_seconds: int = 300
    """How long an anomaly keeps its alert open: longer than Alertmanager's group_interval is
    usually set, and than any scrape interval, so that one bad step cannot slip between two."""

    stalled_seconds: int = 600
    """Without a step for this long a run counts as stalled: evaluation and checkpoints of most
    runs take less."""

    stalled_factor: float = 10.0
    """... or for this many mean steps, whichever is longer: a slow run is not a stalled one."""

    stalled_for_seconds: int = 120
    """Prometheus itself may just have restarted: a page waits for a second look."""

    down_for_seconds: int = 120
    """A few failed scrapes in a row, so that a busy node or one lost packet tells nobody."""

    disappeared_for_seconds: int = 300
    """How long a run may be nowhere before it counts as gone: a scheduler that puts it back on
    another node takes about that."""

    goodbye_seconds: int = 43_200
    """How long a vanished run is remembered: whoever went home finds it in the morning."""

    enforcing_seconds: int = 300
    """How long a lapse of enforcement keeps its alert open, so that it cannot flap."""

    window_seconds: int = 900
    """Over which shares of steps are taken, and warnings that have no episode stay open."""

    level_seconds: int = 900
    """How long a share or a level has to last: it is no moment, and it may pass."""

    spike_share: float = 0.01
    """Share of single steps far out. Healthy runs of this project's benchmark show 0.0006."""

    spike_least: int = 5
    """... and at least this many, so that one of twenty steps says nothing."""

    trend_factor: float = 10.0
    """How far the norm may rise above its median of six hours."""

    trend_for_seconds: int = 600
    """Longer than an episode of spikes, shorter than what loses a night."""

    clipped_share: float = 0.9
    """Share of steps of one rule above which clipping is the learning rate in disguise."""

    skipped_share: float = 0.05
    """Share of dropped steps. A healthy loss scaler dropped 0.013 of them."""

    skipped_least: int = 10
    """... and at least this many: a loss scaler searches its level in its first steps."""

    overhead_share: float = 0.05
    """Share of the step time that gradwatch may take on the training thread."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording rule."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An alert rule without its links, which `rules` adds to every one."""

    name: str
    severity: Severity
    expr: str
    summary: str
    """A sentence that names the run."""

    description: str
    """The values in human units, and what to do first."""

    for_seconds: int = 0
    """0 for what happened at one moment, longer for a condition that may pass."""

    events: tuple[str, ...] = ()
    """Kinds of anomaly that raise it, of docs/detectors.md."""

    dashboard: str = "gradwatch-run"
    """The uid of the dashboard that shows it best."""


def duration(seconds: int) -> str:
    """A PromQL duration in the largest unit that divides it: 600 is `10m`."""
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def words(seconds: int) -> str:
    """The same as a reader says it: 900 is `15 minutes`."""
    unit, size = next(
        (unit, size)
        for unit, size in (("hour", 3600), ("minute", 60), ("second", 1))
        if seconds % size == 0
    )
    count = seconds // size
    return f"{count} {unit}" + ("s" if count != 1 else "")


def kinds(events: tuple[str, ...]) -> str:
    """The matcher of these kinds."""
    return f'event="{events[0]}"' if len(events) == 1 else f'event=~"{"|".join(events)}"'


def happened(events: tuple[str, ...], seconds: int) -> str:
    """The two arms of an alert of ALERT episodes, each of which covers what the other one misses.

    `increase()` sees nothing when the series is born with its first event, the timestamp is off
    when the clocks of trainer and Prometheus differ. The maximum over time keeps the event of a
    process that died right after it.
    """
    window = duration(seconds)
    return (
        "time() - (max by (job, run) (max_over_time("
        f"gradwatch_last_event_timestamp_seconds{{{kinds(events)}}}[{window}])) > 0) < {seconds}\n"
        "or\n" + counted(events, seconds, level='level="alert"')
    )


def counted(events: tuple[str, ...], seconds: int, *, level: str = 'level="warning"') -> str:
    """Anomalies of the matched level within that time; warnings have no timestamp."""
    return (
        "sum by (job, run) (increase("
        f"gradwatch_events_total{{{kinds(events)},{level}}}[{duration(seconds)}])) > 0\n"
    )


def now(query: str, form: str = 'printf "%.4g"') -> str:
    """A template that asks Prometheus for one value; `SELF` in the query selects the run.

    An alert outlives its event: the query is to reach as far back as the expression of the alert.
    """
    return (
        f"{{{{ with printf `{_of_run(query)}` $labels.job $labels.run | query }}}}"
        f"{{{{ . | first | value | {form} }}}}{{{{ else }}}}unknown{{{{ end }}}}"
    )


def how_many(count: str) -> str:
    """A template for a count, which is 0 where there is no series."""
    return now(f"{count} or vector(0)", 'printf "%.0f"')


def which(query: str, label: str, *, otherwise: str) -> str:
    """A template that lists the values of a label, each with its result: `dead (2), stuck (1)`.

    Args:
        otherwise: what is said where the query finds none.
    """
    return (
        f"{{{{ range $i, $found := printf `{_of_run(query)}` $labels.job $labels.run "
        f'| query | sortByLabel "{label}" }}}}{{{{ if $i }}}}, {{{{ end }}}}'
        f'{{{{ $found.Labels.{label} }}}} ({{{{ $found.Value | printf "%.0f" }}}})'
        f"{{{{ else }}}}{otherwise}{{{{ end }}}}"
    )


def _of_run(query: str) -> str:
    return query.replace("SELF", "job=%[1]q,run=%[2]q")
