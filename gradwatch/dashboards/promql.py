"""PromQL as it is written by hand in, PromQL that carries the dashboard's variables out.

    max by (run) (gradwatch_total_norm)
    -> max by (run) (gradwatch_total_norm{job=~"$job",run=~"$run",rank=~"$rank"})

Queries stay readable, none can forget the selection, and none can name a series that the
METRICS table does not have.
"""

from __future__ import annotations

import re

from gradwatch.export.metrics import AGENT_METRICS, END_METRICS, METRICS, PREFIX, MetricSpec

__all__ = ["metric_of", "selecting"]

OVER_RANKS = 'job=~"$job",run=~"$run",rank=~"$rank"'
OVER_ALL_RANKS = 'job=~"$job",run=~"$run"'
"""For series with a layer, which rank 0 alone exports, and for alerts, which have no rank."""

OVER_JOBS = 'job=~"$job"'
"""For what Prometheus or a node agent says of a target, which has no run."""

_SERIES = re.compile(rf"\b({PREFIX}\w+|ALERTS|up|scrape_\w+)\b(?:\{{([^}}]*)\}})?")
_HISTOGRAM_PART = re.compile(r"_(bucket|sum|count)$")


def metric_of(series: str) -> MetricSpec:
    """The metric behind a series name; a histogram's by its `_bucket`, `_sum` or `_count`.

    Raises KeyError where the METRICS table has no such series.
    """
    name = series.removeprefix(PREFIX)
    whole = _HISTOGRAM_PART.sub("", name)
    if whole != name and whole in METRICS and METRICS[whole].type == "histogram":
        return METRICS[whole]
    for others in (AGENT_METRICS, END_METRICS):
        if name in others:
            return others[name]
    if name in METRICS and METRICS[name].type != "histogram":
        return METRICS[name]
    raise KeyError(
        f"{series} is no series of gradwatch.export.metrics.METRICS. "
        "Use a name of that table; a histogram has only _bucket, _sum and _count."
    )


def selecting(query: str, *, ranks: bool = True) -> str:
    """`query` with the variables job, run and rank in every selector, where they say something.

    Args:
        ranks: whether the dashboard has the variable rank.
    """

    def with_selection(match: re.Match[str]) -> str:
        name, matchers = match.group(1), match.group(2)
        return f"{name}{{{_selection(name, ranks)}{',' + matchers if matchers else ''}}}"

    return _SERIES.sub(with_selection, query)


def _selection(name: str, ranks: bool) -> str:
    if name == "ALERTS":
        return OVER_ALL_RANKS
    if not name.startswith(PREFIX) or metric_of(name).name in AGENT_METRICS:
        return OVER_JOBS
    return OVER_RANKS if ranks and "layer" not in metric_of(name).labels else OVER_ALL_RANKS
