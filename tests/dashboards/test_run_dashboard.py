"""What a reader of the run dashboard looks for first."""

from __future__ import annotations

from typing import Any

import pytest

Panel = dict[str, Any]


def _panels(dashboard: Panel) -> list[Panel]:
    return [
        panel
        for top in dashboard["panels"]
        for panel in (top, *top.get("panels", ()))
        if panel["type"] != "row"
    ]


def test_the_rows_go_from_the_verdict_to_the_watching_itself(run_dashboard: Panel) -> None:
    headings = [panel for panel in run_dashboard["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in headings] == ["Verdict", "Trend", "Layers", "gradwatch itself"]
    assert [row["collapsed"] for row in headings] == [False, False, False, True]


def test_the_total_norm_panel_draws_the_limit_on_a_logarithmic_axis(run_dashboard: Panel) -> None:
    (panel,) = [
        p
        for p in _panels(run_dashboard)
        if p["title"] == "Total norm" and p["type"] == "timeseries"
    ]
    assert panel["fieldConfig"]["defaults"]["custom"]["scaleDistribution"] == {
        "log": 10,
        "type": "log",
    }
    assert "gradwatch_limit{" in panel["targets"][-1]["expr"]
    assert panel["targets"][-1]["legendFormat"] == "{{run}} limit {{rule}}"
    styles = {o["matcher"]["options"]: o["properties"] for o in panel["fieldConfig"]["overrides"]}
    assert "custom.lineStyle" in [style["id"] for style in styles["/ limit /"]]


@pytest.mark.parametrize(
    "shown",
    [
        "gradwatch_run_state",
        "gradwatch_anomaly_active",
        "gradwatch_steps_total",
        "gradwatch_total_norm{",
        "gradwatch_clipped_steps_total",
        "gradwatch_skipped_steps_total",
        "gradwatch_last_step_timestamp_seconds",
        "gradwatch_enforcing",
    ],
)
def test_the_first_line_is_the_verdict(run_dashboard: Panel, shown: str) -> None:
    first = [p for p in run_dashboard["panels"] if p["gridPos"]["y"] == 1]
    assert any(shown in target["expr"] for p in first for target in p["targets"])
