"""The dashboard of the watching itself: scrapes, cost, errors, node agents."""

from __future__ import annotations

from gradwatch.dashboards.board import EXPORTER, board
from gradwatch.dashboards.health import health_lines
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import (
    Json,
    count,
    mapping,
    stat,
    state_timeline,
    target,
    thresholds,
    timeseries,
)

__all__ = ["exporter_dashboard"]

_OURS = """and on (job, instance) group by (job, instance) (
  last_over_time(gradwatch_run_state[$__range])
)"""

_ALARM_AT_ONE = thresholds((None, "green"), (1, "red"))


def exporter_dashboard(runbook_url: str) -> Json:
    return board(
        EXPORTER,
        "exporter",
        "Is the watching whole: are runs scraped, what does it cost, what has it lost?",
        [
            Row(title="Scrapes", lines=[_figures(), line(5, _up()), _scrapes()]),
            Row(title="In the training process", lines=health_lines()),
            Row(title="Node agents", lines=[_agents()]),
        ],
        choose=("job", "run", "rank"),
        runbook_url=runbook_url,
    )


def _figures() -> Line:
    return line(
        4,
        count(
            "Targets up",
            "Addresses of runs that answered the last scrape. Fewer than processes: see the "
            "band below for the one that does not.",
            f"count(up == 1\n{_OURS}) or vector(0)",
        ),
        count(
            "Targets down",
            "Addresses of runs, seen within this time range, that do not answer. See whether the "
            "process is alive before you look at the network.",
            f"count(up == 0\n{_OURS}) or vector(0)",
            _ALARM_AT_ONE,
        ),
        count(
            "Series of gradwatch",
            "Series that the chosen runs export now. A Prometheus holds millions; if yours is "
            "small, group layers more coarsely.",
            f"sum(scrape_samples_post_metric_relabeling\n{_OURS})",
        ),
        count(
            "Errors of gradwatch",
            "Errors of gradwatch itself in the time range shown. Any is worth a look in the log "
            "of that run: what that part shows may be missing.",
            "sum(increase(gradwatch_hook_errors_total[$__range])) or vector(0)",
            _ALARM_AT_ONE,
        ),
        count(
            "Steps not recorded",
            "Steps in the time range shown that have no row in a recording. Above 0: put the "
            "recordings on a local disk.",
            "sum(increase(gradwatch_records_dropped_total[$__range])) or vector(0)",
            _ALARM_AT_ONE,
        ),
        stat(
            "Slowest scrape",
            "The longest that a target took to answer just now. A scrape takes the interpreter "
            "from the training thread in slices; above a second, look at the machine's load.",
            f"max(scrape_duration_seconds\n{_OURS})",
            unit="s",
            steps=thresholds((None, "green"), (1, "orange")),
            legend="Slowest scrape",
        ),
    )


def _up() -> Json:
    return state_timeline(
        "Targets",
        "One band per address: red where Prometheus could not scrape it. Short gaps are load or "
        "network; a band that stays red is a process that is gone.",
        target(f"up\n{_OURS}", "{{job}} {{instance}}"),
        mappings=mapping(_0=("down", "red"), _1=("up", "green")),
    )


def _scrapes() -> Line:
    return line(
        7,
        timeseries(
            "Scrape duration",
            "How long each target took to answer. It grows with the number of layers; a jump "
            "without new layers is a machine that is busy.",
            target(f"scrape_duration_seconds\n{_OURS}", "{{job}} {{instance}}"),
            unit="s",
            least=0,
        ),
        timeseries(
            "Series per target",
            "Series in each scrape. Prometheus refuses a whole scrape above its sample_limit: "
            "keep some distance to it.",
            target(
                f"scrape_samples_post_metric_relabeling\n{_OURS}",
                "{{job}} {{instance}}",
            ),
            unit="none",
            least=0,
        ),
    )


def _agents() -> Line:
    return line(
        7,
        timeseries(
            "Recordings that node agents follow",
            "Recordings by the state of their runs, per machine with `gradwatch serve`; empty "
            "without one. crashed: a process is gone; reading: the agent has just started.",
            target("gradwatch_agent_recordings", "{{instance}} {{state}}"),
            unit="none",
            bars=True,
            least=0,
        ),
        timeseries(
            "Files that are no recordings",
            "Files that look like recordings and cannot be read. Above 0: look at the agent's "
            "log for which, and whether a disk was full.",
            target("gradwatch_agent_unreadable_files", "{{instance}}"),
            unit="none",
            least=0,
        ),
        timeseries(
            "Errors of node agents",
            "Errors of the agents themselves; the runs are not touched. Any: read the agent's "
            "log, and report it with the traceback.",
            target(
                "increase(gradwatch_agent_errors_total[$__rate_interval])",
                "{{instance}}",
            ),
            unit="none",
            bars=True,
            least=0,
        ),
    )
