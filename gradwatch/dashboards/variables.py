"""The dashboard's variables, chained: data source -> job -> run -> rank, layer."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.dashboards.layout import DATASOURCE
from gradwatch.dashboards.panels import Json

__all__ = ["variables"]

_ON_TIME_RANGE_CHANGE = 2
_ALPHABETICAL, _NUMERICAL = 1, 3


def variables(choose: Sequence[str]) -> list[Json]:
    """The data source and those named, each narrowed by the ones before it.

    Values come from `gradwatch_info`, one series per rank, so that asking costs little.
    """
    of_job = 'gradwatch_info{job=~"$job"}'
    of_run = 'gradwatch_info{job=~"$job",run=~"$run"}'
    layers = 'gradwatch_grad_norm{job=~"$job",run=~"$run"}'
    known = {
        "job": _labels("job", "gradwatch_info", "Job", "Prometheus job that scrapes the run."),
        "run": _labels("run", of_job, "Run", "Training run; compare several, or all."),
        "rank": _labels("rank", of_run, "Rank", "Process of the run.", sort=_NUMERICAL),
        "layer": _labels("layer", layers, "Layer", "The layer that is shown.", several=False),
    }
    return [_datasource(), *(known[name] for name in choose)]


def _datasource() -> Json:
    """Chosen by the reader: an `__inputs` placeholder would work in the import dialog only."""
    return {
        "current": {},
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "type": "datasource",
    }


def _labels(
    name: str,
    series: str,
    label: str,
    description: str,
    *,
    several: bool = True,
    sort: int = _ALPHABETICAL,
) -> Json:
    query = f"label_values({series}, {name})"
    variable: Json = {
        "current": {"selected": True, "text": "All", "value": "$__all"} if several else {},
        "datasource": DATASOURCE,
        "definition": query,
        "description": description,
        "hide": 0,
        "includeAll": several,
        "label": label,
        "multi": several,
        "name": name,
        "options": [],
        "query": {"qryType": 1, "query": query, "refId": f"{name}-values"},
        "refresh": _ON_TIME_RANGE_CHANGE,
        "regex": "",
        "sort": sort,
        "type": "query",
    }
    if several:
        variable["allValue"] = ".*"
    return variable
