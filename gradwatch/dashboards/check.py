"""Every query of a dashboard, asked of a real Prometheus: "No data" is found before a reader is.

dashboard -> its variables, each resolved by what Prometheus knows -> its queries -> Answers
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradwatch.dashboards.files import read_files
from gradwatch.dashboards.prometheus import Prometheus, QueryError
from gradwatch.dashboards.promql import metric_of
from gradwatch.errors import MonitoringError

__all__ = ["Answer", "Window", "check_dashboard", "read_dashboards"]

Status = Literal["data", "empty", "needs", "error"]
"""needs: empty, because nothing here has what the metric needs, such as a loss scaler."""

POINTS = 300
"""Of a query over time, as many as a panel of usual width has."""

_LABEL_VALUES = re.compile(r"label_values\((?P<series>.+),\s*(?P<label>\w+)\)", re.DOTALL)
_OF_GRADWATCH = re.compile(r"\bgradwatch_\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What Grafana would show: the time range, and how often targets are scraped."""

    end: float
    """Unix time in seconds."""

    seconds: float = 3600.0
    scrape_seconds: float = 15.0

    @property
    def start(self) -> float:
        return self.end - self.seconds

    @property
    def step(self) -> float:
        return max(self.seconds / POINTS, self.scrape_seconds)

    def own(self) -> dict[str, str]:
        """Grafana's variables; the rate interval is at least four scrapes, as it is there."""
        rate = max(self.step + self.scrape_seconds, 4 * self.scrape_seconds)
        return {
            "__rate_interval": f"{round(rate * 1000)}ms",
            "__interval": f"{round(self.step * 1000)}ms",
            "__range": f"{round(self.seconds)}s",
            "__range_s": f"{round(self.seconds)}",
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one query."""

    dashboard: str
    panel: str
    ref: str
    query: str
    status: Status
    detail: str = ""
    """The error, or what is needed."""

    series: int = 0


def read_dashboards(directory: Path) -> dict[str, dict[str, Any]]:
    """The dashboards of a directory by file name.

    Raises:
        MonitoringError: there is none, or a file is no dashboard.
    """
    found = {}
    for path, dashboard in read_files(directory):
        if not isinstance(dashboard, dict) or not isinstance(dashboard.get("panels"), list):
            raise MonitoringError(f"{path}: no dashboard: it has no list of panels")
        found[path.name] = dashboard
    return found


def check_dashboard(
    dashboard: Mapping[str, Any], prometheus: Prometheus, window: Window
) -> Iterator[Answer]:
    """Asks the queries of variables, panels and annotations, in the order in which they stand.

    Raises:
        MonitoringError: Prometheus does not answer at all.
    """
    title = str(dashboard.get("title", "?"))
    values = window.own()
    for variable in dashboard.get("templating", {}).get("list", ()):
        if variable.get("type") == "query":
            yield _resolve(title, variable, values, prometheus, window)
    for panel in _panels(dashboard["panels"]):
        for target in panel.get("targets", ()):
            where = (title, str(panel.get("title", "?")), str(target.get("refId", "?")))
            query = _filled(str(target.get("expr", "")), values)
            yield _asked(where, query, prometheus, window, now=bool(target.get("instant")))
    for mark in dashboard.get("annotations", {}).get("list", ()):
        if "expr" in mark:
            where = (title, f"annotation {mark.get('name', '?')}", "A")
            answer = _asked(where, _filled(mark["expr"], values), prometheus, window, now=False)
            if answer.status != "empty":  # Without an anomaly there is nothing to mark.
                yield answer


def _resolve(
    title: str,
    variable: Mapping[str, Any],
    values: dict[str, str],
    prometheus: Prometheus,
    window: Window,
) -> Answer:
    """Chooses as a reader who opens the dashboard: all where that is offered, else the first."""
    name, query = str(variable["name"]), _text_of(variable.get("query"))
    where = (title, f"variable {name}", "A")
    match = _LABEL_VALUES.fullmatch(query)
    if match is None:
        return Answer(*where, query, "error", "only label_values(SERIES, LABEL) can be resolved")
    series = _filled(match["series"], values)
    try:
        found = prometheus.label_values(match["label"], series, window.start, window.end)
    except QueryError as error:
        return Answer(*where, series, "error", str(error))
    if not found:
        return Answer(*where, series, "empty", "no series here has that label")
    every = variable.get("allValue") or "|".join(map(re.escape, found))
    values[name] = every if variable.get("includeAll") else found[0]
    return Answer(*where, series, "data", series=len(found))


def _asked(
    where: tuple[str, str, str], query: str, prometheus: Prometheus, window: Window, *, now: bool
) -> Answer:
    try:
        if now:
            series = prometheus.query(query, window.end)
        else:
            series = prometheus.query_range(query, window.start, window.end, window.step)
    except QueryError as error:
        return Answer(*where, query, "error", str(error))
    if series:
        return Answer(*where, query, "data", series=len(series))
    needed = _needs(query)
    return Answer(*where, query, "needs" if needed else "empty", needed)


def _needs(query: str) -> str:
    """What the metrics of a query need that not every run has."""
    needed = ["an alert that fires"] if "ALERTS" in query else []
    for name in dict.fromkeys(_OF_GRADWATCH.findall(query)):
        try:
            needed.append(metric_of(name).needs)
        except KeyError:
            continue
    return ", ".join(dict.fromkeys(filter(None, needed)))


def _filled(query: str, values: Mapping[str, str]) -> str:
    """Variables replaced, in the three forms that Grafana knows; unknown ones are left."""

    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"] or match["square"]
        return values.get(name, match[0])

    return re.sub(
        r"\$\{(?P<braced>\w+)(?::\w+)?\}|\$(?P<plain>\w+)|\[\[(?P<square>\w+)\]\]", value, query
    )


def _text_of(query: object) -> str:
    return str(query.get("query", "")) if isinstance(query, Mapping) else str(query or "")


def _panels(panels: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels") or ())
