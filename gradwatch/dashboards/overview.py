"""The overview: every run, which of them need somebody, and the way to each."""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.board import OVERVIEW, RUN, board, link_to
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import (
    Json,
    count,
    mapping,
    state_timeline,
    styled,
    table,
    target,
    thresholds,
    timeseries,
)
from gradwatch.dashboards.verdict import CLIPPED_SHARE, STATE, STATES

__all__ = ["overview_dashboard"]

_ALARM_AT_ONE = thresholds((None, "green"), (1, "red"))
_WARN_AT_ONE = thresholds((None, "green"), (1, "orange"))

_OPEN = "max by (job, run, event) (gradwatch_anomaly_active)"
_FIRING = 'ALERTS{{alertname=~"Gradwatch.+",alertstate="firing",severity="{severity}"}}'

_SILENT = f"""count(
  time() - max by (run) (gradwatch_last_step_timestamp_seconds > 0) > {THRESHOLDS.stalled_seconds}
  and on (run) max by (run) (gradwatch_run_state{{state="running"}}) == 1
) or vector(0)"""


def overview_dashboard(runbook_url: str) -> Json:
    return board(
        OVERVIEW,
        "overview",
        "All runs: which are well, which need somebody, and since when.",
        [
            Row(title="Now", lines=[_figures(), line(10, _runs())]),
            Row(title="Since when", lines=[line(8, _episodes()), _norms(), _pace()]),
            Row(title="Runs that have ended", lines=[line(9, _ended())]),
        ],
        choose=("job", "run"),
        runbook_url=runbook_url,
    )


def _figures() -> Line:
    return line(
        4,
        count(
            "Running",
            "Runs that say that they train. Fewer than you started: see the state of each below, "
            "and what the scheduler says of the missing one.",
            'count(max by (job, run) (gradwatch_run_state{state="running"}) == 1) or vector(0)',
        ),
        count(
            "Runs with an open anomaly",
            "Runs in which an ALERT episode of any kind is open now. Click the run in the table: "
            "its first row says which kind and since when.",
            f"count(max by (job, run) ({_OPEN}) == 1) or vector(0)",
            _ALARM_AT_ONE,
        ),
        count(
            "Critical alerts",
            "Alerts that ask for a human now: each has a section in the runbook. Start with the "
            "one that fired first, in the band below.",
            f"count({_FIRING.format(severity='critical')}) or vector(0)",
            _ALARM_AT_ONE,
        ),
        count(
            "Warnings",
            "Alerts that are worth a look today. While a run pages, its own warnings say nothing "
            "new: treat the page first.",
            f"count({_FIRING.format(severity='warning')}) or vector(0)",
            _WARN_AT_ONE,
        ),
        count(
            "Running without steps",
            "Runs that say that they train and have made no step for ten minutes. Evaluation and "
            "checkpoints may take that long; if not, dump the stacks before you restart.",
            _SILENT,
            _ALARM_AT_ONE,
        ),
        count(
            "Targets down",
            "Addresses of runs, seen within this time range, that Prometheus cannot scrape now. "
            "Either the process is gone or the network is: see GradwatchExporterDown.",
            "count(\n  up == 0 and on (job, instance) "
            "group by (job, instance) (last_over_time(gradwatch_run_state[$__range]))\n"
            ") or vector(0)",
            _ALARM_AT_ONE,
        ),
    )


def _runs() -> Json:
    shown = {
        "Value #A": ("State", STATE),
        "Value #B": ("Open anomalies", f"sum by (run) ({_OPEN})"),
        "Value #C": ("Step", "max by (run) (gradwatch_step)"),
        "Value #D": ("Steps/s", "max by (run) (rate(gradwatch_steps_total[5m]))"),
        "Value #E": ("Total norm", "max by (run) (gradwatch_total_norm)"),
        "Value #F": ("Clipped", CLIPPED_SHARE),
        "Value #G": (
            "Skipped",
            "max by (run) (sum by (run, rank) (increase(gradwatch_skipped_steps_total[$__range])))",
        ),
        "Value #H": (
            "Last step ago",
            "time() - max by (run) (gradwatch_last_step_timestamp_seconds > 0)",
        ),
    }
    return table(
        "Runs",
        "One line per run, the ones with open anomalies on top. Click a name for its dashboard; "
        "clipped and skipped are of the time range shown.",
        *(target(query, now=True, form="table") for _, query in shown.values()),
        unit="none",
        columns={"run": "Run", **{field: heading for field, (heading, _) in shown.items()}},
        sort_by="Open anomalies",
        overrides=(
            styled("Run", links=[link_to(RUN, "Show this run", run="Run")]),
            styled("State", mappings=STATES),
            styled("Clipped", unit="percentunit", decimals=1),
            styled("Steps/s", decimals=2),
            styled("Skipped", decimals=0),
            styled("Last step ago", unit="s", decimals=0),
        ),
    )


def _episodes() -> Json:
    return state_timeline(
        "Anomalies and alerts of every run",
        "Red while an ALERT episode or an alert of Prometheus is open. Several runs at the same "
        "moment: look at what they share, the storage, the network or the data.",
        target(f"max by (run) ({_OPEN})", "{{run}} anomaly"),
        target(
            'max by (run, alertname) (ALERTS{alertname=~"Gradwatch.+",alertstate="firing"})',
            "{{run}} {{alertname}}",
        ),
        mappings=mapping(_0=("quiet", "transparent"), _1=("open", "red")),
    )


def _ended() -> Json:
    state = " + ".join(
        f'{value} * max by (run) (gradwatch_end_state{{state="{name}"}})'
        for value, name in ((2, "finished"), (3, "stopped"), (4, "crashed"))
    )
    alerts = 'gradwatch_end_events{level="alert"}'
    shown = {
        "Value #A": ("Ended as", state),
        "Value #B": ("At", "1000 * max by (run) (gradwatch_end_timestamp_seconds)"),
        "Value #C": ("Steps", "max by (run) (gradwatch_end_steps)"),
        "Value #D": ("Alerts", f"max by (run) (sum by (run, rank) ({alerts}))"),
        "Value #E": (
            "Skipped",
            "max by (run) (sum by (run, rank) (gradwatch_end_skipped_steps))",
        ),
        "Value #F": (
            "Clipped by the busiest rule",
            "max by (run) (max by (run, rule) (gradwatch_end_clipped_steps))",
        ),
        "Value #G": ("Largest norm", "max by (run) (gradwatch_end_total_norm_max)"),
        "Value #H": ("Last norm", "max by (run) (gradwatch_end_total_norm)"),
        "Value #I": ("Last loss", "max by (run) (gradwatch_end_loss)"),
    }
    return table(
        "Ended runs, as they told a Pushgateway",
        "What a run with attach(..., pushgateway=...) left when it ended; empty without one. It "
        "stays until `gradwatch forget` deletes it: read it the morning after.",
        *(target(query, now=True, form="table") for _, query in shown.values()),
        unit="none",
        columns={"run": "Run", **{field: heading for field, (heading, _) in shown.items()}},
        sort_by="At",
        overrides=(
            styled("Ended as", mappings=STATES),
            styled("At", unit="dateTimeAsIso"),
        ),
    )


def _norms() -> Line:
    return line(
        8,
        timeseries(
            "Largest total norm of each run",
            "Largest total norm of the last minute before clipping, so that one bad step shows. "
            "Compare runs of the same model: the one that leaves the bundle needs a look.",
            target("max by (run) (gradwatch_total_norm_window_max)", "{{run}}"),
            unit="none",
            log=True,
        ),
        timeseries(
            "Loss of each run",
            "Last loss given to watch.log. A run whose loss leaves those of its kind: open it and "
            "see whether its norm left first.",
            target("max by (run) (gradwatch_loss)", "{{run}}"),
            unit="none",
        ),
    )


def _pace() -> Line:
    return line(
        7,
        timeseries(
            "Speed of each run",
            "Optimizer steps per second. All runs slower at once: the storage or the network they "
            "share. One alone: its node or its data.",
            target("max by (run) (rate(gradwatch_steps_total[$__rate_interval]))", "{{run}}"),
            unit="cps",
            least=0,
        ),
        timeseries(
            "Anomalies of each run",
            "What the detectors found, events of single steps included. A run with many spikes "
            "is worth a look before it explodes: open it and see which layer.",
            target(
                "sum by (run) (increase(gradwatch_events_total[$__rate_interval]))",
                "{{run}}",
            ),
            unit="none",
            bars=True,
            least=0,
        ),
    )
