"""What all dashboards share: the frame around the rows, links between them, annotations."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.dashboards.layout import DATASOURCE, Row, place
from gradwatch.dashboards.panels import Json
from gradwatch.dashboards.promql import selecting
from gradwatch.dashboards.variables import variables

__all__ = [
    "CLIPPING",
    "DISTRIBUTED",
    "EXPORTER",
    "LAYER",
    "OVERVIEW",
    "RUN",
    "board",
    "link_to",
]

OVERVIEW = "gradwatch-overview"
RUN = "gradwatch-run"
LAYER = "gradwatch-layer"
CLIPPING = "gradwatch-clipping"
DISTRIBUTED = "gradwatch-distributed"
EXPORTER = "gradwatch-exporter"

SCHEMA_VERSION = 39
"""Grafana 10.4 and newer read it; older tables and heat maps look different."""

_SHARED_CROSSHAIR = 1


def board(
    uid: str,
    title: str,
    description: str,
    rows: Sequence[Row],
    *,
    choose: Sequence[str],
    runbook_url: str,
) -> Json:
    """The classic JSON model of one dashboard, without a numeric id and without `__inputs`.

    Args:
        choose: the variables beside the data source, in the order in which they depend on each
            other.
    """
    return {
        "annotations": {"list": [_alerts(), _anomalies(ranks="rank" in choose), _pushed()]},
        "description": description,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": _SHARED_CROSSHAIR,
        "links": [_siblings(), _runbook(runbook_url)],
        "panels": place(rows, ranks="rank" in choose),
        "refresh": "10s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["gradwatch", "training"],
        "templating": {"list": variables(choose)},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": f"gradwatch / {title}",
        "uid": uid,
        "weekStart": "",
    }


def link_to(uid: str, title: str, **fields: str) -> Json:
    """A link from a table's cell: the time range, the data source, and variables from its row.

    `run="Run"` sets the variable run to the row's column of that heading.
    """
    chosen = "".join(f"&var-{name}=${{__data.fields.{field}}}" for name, field in fields.items())
    kept = "".join(f"&${{{name}:queryparam}}" for name in ("datasource", "job"))
    return {"title": title, "url": f"/d/{uid}?${{__url_time_range}}{kept}{chosen}"}


def _alerts() -> Json:
    return _annotation(
        "Alerts",
        'ALERTS{alertname=~"Gradwatch.+",alertstate="firing"}',
        color="red",
        title="{{alertname}}",
        tags="run,severity",
    )


def _anomalies(*, ranks: bool) -> Json:
    """Marks at the value, a time in ms, rather than at the scrape that brought it."""
    return _annotation(
        "Anomalies",
        "gradwatch_last_event_timestamp_seconds * 1000 > 0",
        color="orange",
        title="{{event}}",
        tags="run,event",
        ranks=ranks,
    ) | {"useValueForTime": True}


def _pushed() -> Json:
    """What `gradwatch dashboards push --recording` has written. Of all runs: a variable of several
    values cannot be put into a tag."""
    return {
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": False,
        "iconColor": "purple",
        "name": "Pushed findings",
        "target": {"limit": 100, "matchAny": False, "tags": ["gradwatch"], "type": "tags"},
    }


def _annotation(
    name: str, query: str, *, color: str, title: str, tags: str, ranks: bool = True
) -> Json:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": selecting(query, ranks=ranks),
        "hide": False,
        "iconColor": color,
        "name": name,
        "step": "10s",
        "tagKeys": tags,
        "textFormat": "{{run}}",
        "titleFormat": title,
        "useValueForTime": False,
    }


def _siblings() -> Json:
    return {
        "asDropdown": True,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "tags": ["gradwatch"],
        "targetBlank": False,
        "title": "gradwatch",
        "tooltip": "The other dashboards, with the same run and time",
        "type": "dashboards",
        "url": "",
    }


def _runbook(url: str) -> Json:
    return {
        "asDropdown": False,
        "icon": "doc",
        "includeVars": False,
        "keepTime": False,
        "tags": [],
        "targetBlank": True,
        "title": "Runbook",
        "tooltip": "What each alert means and what to do",
        "type": "link",
        "url": url,
    }
