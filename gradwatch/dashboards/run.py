"""The run dashboard: verdict, trend, layers, and gradwatch itself, from top to bottom."""

from __future__ import annotations

from gradwatch.dashboards.board import RUN, board
from gradwatch.dashboards.health import health
from gradwatch.dashboards.layers import layers
from gradwatch.dashboards.panels import Json
from gradwatch.dashboards.trend import trend
from gradwatch.dashboards.verdict import verdict

__all__ = ["run_dashboard"]


def run_dashboard(runbook_url: str) -> Json:
    return board(
        RUN,
        "run",
        "One training run: is it well, since when not, and which layer moved first.",
        [verdict(), trend(), layers(), health()],
        choose=("job", "run", "rank"),
        runbook_url=runbook_url,
    )
