"""PromQL as it is written by hand in, PromQL that carries the dashboard's variables out.

    max by (run) (gradwatch_total_norm)
    -> max by (run) (gradwatch_total_norm{job=~"$job",run=~"$run",rank=~"$rank"})

Queries stay readable, none can forget the selection, and none can name a series that the
METRICS table does not have.
"""

from __future__ import annotations

import re

from gradwatch.export.metrics import METRICS, PREFIX, MetricSpec

__all__ = ["OVER_ALL_RANKS", "OVER_RANKS", "metric_of", "selecting"]

OVER_RANKS = 'job=~"$job",run=~"$run",rank=~"$rank"'
OVER_ALL_RANKS = 'job=~"$job",run=~"$run"'
"""For series with a layer, which rank 0 alone exports, and for alerts, which have no rank."""

_SERIES = re.compile(rf"\b({PREFIX}\w+|ALERTS)\b(?:\{{([^}}]*)\}})?")
_HISTOGRAM_PART = re.compile(r"_(bucket|sum|count)$")


def metric_of(series: str) -> MetricSpec:
    """The metric behind a series name; a histogram's by its `_bucket`, `_sum` or `_count`.

    Raises KeyError where the METRICS table has no such series.
    """
    name = series.removeprefix(PREFIX)
    whole = _HISTOGRAM_PART.sub("", name)
    if whole != name and whole in METRICS and METRICS[whole].type == "histogram":
        return METRICS[whole]
    if name in METRICS and METRICS[name].type != "histogram":
        return METRICS[name]
    raise KeyError(
        f"{series} is no series of gradwatch.export.metrics.METRICS. "
        "Use a name of that table; a histogram has only _bucket, _sum and _count."
    )


def selecting(query: str) -> str:
    """`query` with the variables job, run and, where it says something, rank in every selector."""
    return _SERIES.sub(_with_selection, query)


def _with_selection(match: re.Match[str]) -> str:
    name, matchers = match.group(1), match.group(2)
    selection = OVER_ALL_RANKS if _has_no_rank_to_choose(name) else OVER_RANKS
    return f"{name}{{{selection}{',' + matchers if matchers else ''}}}"


def _has_no_rank_to_choose(name: str) -> bool:
    return name == "ALERTS" or "layer" in metric_of(name).labels
