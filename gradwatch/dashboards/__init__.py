"""The METRICS table in, dashboards for Grafana and rules for Prometheus out.

    write_dashboards("dashboards")   # dashboards/gradwatch-overview.json, -run, -layer, ...
    write_rules("dashboards")        # dashboards/rules/gradwatch.rules.yml

Both are committed; a test compares them with what this package builds.
"""

from __future__ import annotations

import json
from pathlib import Path

from gradwatch.dashboards.alert import Thresholds
from gradwatch.dashboards.clipping import clipping_dashboard
from gradwatch.dashboards.distributed import distributed_dashboard
from gradwatch.dashboards.exporter import exporter_dashboard
from gradwatch.dashboards.layer import layer_dashboard
from gradwatch.dashboards.overview import overview_dashboard
from gradwatch.dashboards.rules import RUNBOOK_URL, build_rules, prometheus_rule, write_rules
from gradwatch.dashboards.run import run_dashboard

__all__ = [
    "RUNBOOK_URL",
    "Thresholds",
    "build_dashboards",
    "build_rules",
    "prometheus_rule",
    "write_dashboards",
    "write_rules",
]


def build_dashboards(*, runbook_url: str = RUNBOOK_URL) -> dict[str, str]:
    """File name -> JSON text, keys sorted, so that a change is a small diff."""
    dashboards = [
        overview_dashboard(runbook_url),
        run_dashboard(runbook_url),
        layer_dashboard(runbook_url),
        clipping_dashboard(runbook_url),
        distributed_dashboard(runbook_url),
        exporter_dashboard(runbook_url),
    ]
    return {
        f"{dashboard['uid']}.json": json.dumps(dashboard, indent=2, sort_keys=True) + "\n"
        for dashboard in dashboards
    }


def write_dashboards(directory: str | Path, *, runbook_url: str = RUNBOOK_URL) -> list[Path]:
    """Write every dashboard into `directory`, made if need be, and say where."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in build_dashboards(runbook_url=runbook_url).items():
        path = Path(directory, name)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
