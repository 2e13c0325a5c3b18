"""The dashboard of one run on many ranks: which of them is not like the others."""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.board import DISTRIBUTED, board
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import (
    Json,
    mapping,
    stat,
    state_timeline,
    styled,
    table,
    target,
    thresholds,
    timeseries,
)

__all__ = ["distributed_dashboard"]

_AGO = "time() - max by (run, rank) (gradwatch_last_step_timestamp_seconds > 0)"

_STEP_TIME = """sum by (run, rank) (rate(gradwatch_step_duration_seconds_sum[$__rate_interval]))
/ (sum by (run, rank) (rate(gradwatch_step_duration_seconds_count[$__rate_interval])) > 0)"""

_MEAN_STEP = """sum by (run, rank) (gradwatch_step_duration_seconds_sum)
/ (sum by (run, rank) (gradwatch_step_duration_seconds_count) > 0)"""

_APART = "max by (run) (gradwatch_step) - min by (run) (gradwatch_step)"

_SPREAD = """max by (run) (gradwatch_local_norm)
/ (min by (run) (gradwatch_local_norm) > 0)"""

_DIFFERENT = """count by (run) (
  group by (run, version, framework, mode, policy, model) (gradwatch_info)
)"""

_OVERHEAD = """sum by (run, rank) (rate(gradwatch_overhead_seconds_total[$__rate_interval]))
/ (sum by (run, rank) (rate(gradwatch_step_duration_seconds_sum[$__rate_interval])) > 0)"""


def distributed_dashboard(runbook_url: str) -> Json:
    return board(
        DISTRIBUTED,
        "distributed",
        "One run on many ranks: do all of them take part, and which is not like the others?",
        [
            Row(title="All ranks", lines=[_figures(), line(9, _ranks()), line(5, _states())]),
            Row(title="Rank by rank", lines=[_norms(), _times(), line(7, _behind(), _errors())]),
        ],
        choose=("job", "run", "rank"),
        runbook_url=runbook_url,
    )


def _figures() -> Line:
    return line(
        4,
        stat(
            "Ranks that answer",
            "Processes of the run that were scraped just now. Fewer than you started: one is "
            "gone, or its port is not reached; the table shows which one is missing.",
            "count by (run) (group by (run, rank) (gradwatch_info))",
            unit="none",
            decimals=0,
        ),
        stat(
            "Steps apart",
            "Last step of the first rank minus that of the last. Ranks run in lock-step, so that "
            "more than a scrape's worth means that one has stopped: dump its stack.",
            _APART,
            unit="none",
            decimals=0,
        ),
        stat(
            "Longest without a step",
            "Time since the last step of the rank that is furthest behind. When it grows, all "
            "wait for one: it is the one whose stack is not in a collective.",
            f"max by (run) ({_AGO})",
            unit="s",
            steps=thresholds((None, "green"), (THRESHOLDS.stalled_seconds, "red")),
            decimals=0,
        ),
        stat(
            "Own norms apart",
            "Largest own norm of a rank over the least, sampled before averaging; needs DDP. "
            "Different batches make some 2 of it; far more is another kind of data.",
            _SPREAD,
            unit="none",
            decimals=2,
        ),
        stat(
            "Open anomalies of ranks",
            "Open episodes of the kinds rank_divergence and rank_outlier. Any: read layer and "
            "rank in the log of rank 0 or on the card.",
            "sum by (run) (max by (run, event) "
            '(gradwatch_anomaly_active{event=~"rank_divergence|rank_outlier"}))',
            unit="none",
            steps=thresholds((None, "green"), (1, "red")),
            decimals=0,
        ),
        stat(
            "Kinds of process",
            "Different versions, frameworks, modes, policies or models among the ranks. It must "
            "be 1: otherwise some ranks train under another policy; see the table.",
            _DIFFERENT,
            unit="none",
            steps=thresholds((None, "green"), (2, "red")),
            decimals=0,
        ),
    )


def _ranks() -> Json:
    return table(
        "Ranks",
        "One line per process, where it runs and how far it is. The one that differs from the "
        "others in step, time or norm is where to look.",
        target(
            "max by (run, rank, instance, mode, policy, version) (gradwatch_info)",
            now=True,
            form="table",
        ),
        target("max by (run, rank) (gradwatch_step)", now=True, form="table"),
        target(_AGO, now=True, form="table"),
        target(_MEAN_STEP, now=True, form="table"),
        target("max by (run, rank) (gradwatch_local_norm)", now=True, form="table"),
        target(
            "sum by (run, rank) (increase(gradwatch_hook_errors_total[$__range]))",
            now=True,
            form="table",
        ),
        unit="none",
        columns={
            "run": "Run",
            "rank": "Rank",
            "instance": "Address",
            "Value #B": "Step",
            "Value #C": "Last step ago",
            "Value #D": "Mean step",
            "Value #E": "Own norm",
            "Value #F": "Errors",
            "mode": "Mode",
            "policy": "Policy",
            "version": "gradwatch",
        },
        sort_by="Rank",
        descending=False,
        overrides=(
            styled("Last step ago", unit="s", decimals=0),
            styled("Mean step", unit="s"),
            styled("Errors", decimals=0),
        ),
    )


def _states() -> Json:
    return state_timeline(
        "Ranks that say that they train",
        "One band per rank: green while it runs, empty where it was not scraped. The band that "
        "ends first is the rank that was lost; the others follow.",
        target('max by (run, rank) (gradwatch_run_state{state="running"})', "{{run}} {{rank}}"),
        mappings=mapping(_0=("ended", "blue"), _1=("running", "green")),
    )


def _norms() -> Line:
    return line(
        8,
        timeseries(
            "Own norm of each rank",
            "L2 norm of a rank's own gradient before it is averaged with the others, sampled; "
            "needs DDP. One line away from the bundle: its data, its seed or its hardware.",
            target("max by (run, rank) (gradwatch_local_norm)", "{{run}} {{rank}}"),
            unit="none",
            log=True,
        ),
        timeseries(
            "Own norms apart",
            "Largest own norm over the least. A level is the data; a rise is a rank that leaves "
            "the others, see which in the panel beside.",
            target(_SPREAD, "{{run}}"),
            unit="none",
            log=True,
        ),
    )


def _times() -> Line:
    return line(
        8,
        timeseries(
            "Step time of each rank",
            "Mean time from one step to the next. In lock-step all have the same; where they "
            "part, ranks are no longer in the same loop.",
            target(_STEP_TIME, "{{run}} {{rank}}"),
            unit="s",
            least=0,
        ),
        timeseries(
            "Share of the step that gradwatch takes, by rank",
            "Time on the training thread per step time; waiting for the other ranks in the one "
            "collective counts. One rank with less than the others is the one they wait for.",
            target(_OVERHEAD, "{{run}} {{rank}}"),
            unit="percentunit",
            least=0,
            marks=((THRESHOLDS.overhead_share, "orange"),),
        ),
    )


def _behind() -> Json:
    return timeseries(
        "Time since the last step of each rank",
        "It should be a step's time and a scrape's. Lines that rise together are a hang: the "
        "run waits in a collective for a rank that is elsewhere.",
        target(_AGO, "{{run}} {{rank}}"),
        unit="s",
        least=0,
        marks=((THRESHOLDS.stalled_seconds, "red"),),
    )


def _errors() -> Json:
    return timeseries(
        "Errors of gradwatch, by rank",
        "Training goes on after each of these, in an enforcing run until the guard says stop. "
        "On one rank alone: its disk or its port. Read the log of that rank.",
        target(
            "sum by (run, rank) (increase(gradwatch_hook_errors_total[$__rate_interval]))",
            "{{run}} {{rank}}",
        ),
        unit="none",
        bars=True,
        least=0,
    )
