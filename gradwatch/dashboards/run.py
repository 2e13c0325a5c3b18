"""The run dashboard: verdict, trend, layers, and gradwatch itself, from top to bottom."""

from __future__ import annotations

from gradwatch.dashboards.health import health
from gradwatch.dashboards.layers import DASHBOARD_UID, layers
from gradwatch.dashboards.layout import DATASOURCE, place
from gradwatch.dashboards.panels import Json
from gradwatch.dashboards.promql import selecting
from gradwatch.dashboards.rules import RUNBOOK_URL
from gradwatch.dashboards.trend import trend
from gradwatch.dashboards.variables import variables
from gradwatch.dashboards.verdict import verdict

__all__ = ["run_dashboard"]

SCHEMA_VERSION = 39
"""Grafana 10.4 and newer read it; older tables and heat maps look different."""

_SHARED_CROSSHAIR = 1


def run_dashboard(runbook_url: str = RUNBOOK_URL) -> Json:
    """The classic JSON model of the dashboard, without a numeric id and without `__inputs`."""
    return {
        "annotations": {"list": [_alerts(), _anomalies()]},
        "description": "One training run: is it well, since when not, and which layer moved first.",
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": _SHARED_CROSSHAIR,
        "links": [_runbook(runbook_url)],
        "panels": place([verdict(), trend(), layers(), health()]),
        "refresh": "10s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["gradwatch", "training"],
        "templating": {"list": variables()},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": "gradwatch / run",
        "uid": DASHBOARD_UID,
        "weekStart": "",
    }


def _alerts() -> Json:
    return _annotation(
        "Alerts",
        'ALERTS{alertname=~"Gradwatch.+",alertstate="firing"}',
        color="red",
        title="{{alertname}}",
        tags="run,severity",
    )


def _anomalies() -> Json:
    """Marks at the value, a time in ms, rather than at the scrape that brought it."""
    return _annotation(
        "Anomalies",
        "gradwatch_last_event_timestamp_seconds * 1000 > 0",
        color="orange",
        title="{{event}}",
        tags="run,event",
    ) | {"useValueForTime": True}


def _annotation(name: str, query: str, *, color: str, title: str, tags: str) -> Json:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": selecting(query),
        "hide": False,
        "iconColor": color,
        "name": name,
        "step": "10s",
        "tagKeys": tags,
        "textFormat": "{{run}}",
        "titleFormat": title,
        "useValueForTime": False,
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
