"""What a reader of the run dashboard may rely on, checked in its JSON."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from gradwatch.dashboards import build_dashboards, write_dashboards
from gradwatch.dashboards.layout import COLUMNS

Panel = dict[str, Any]

PANEL_TYPES = {"row", "stat", "timeseries", "heatmap", "table", "state-timeline"}
"""All of Grafana's own since version 8; the Angular ones are gone."""


def test_the_committed_files_are_the_built_ones(committed: Path) -> None:
    assert {path.name: path.read_text() for path in committed.glob("*.json")} == build_dashboards()


def test_writing_gives_the_built_files_in_a_directory_that_did_not_exist(tmp_path: Path) -> None:
    written = write_dashboards(tmp_path / "new")
    assert {path.name: path.read_text() for path in written} == build_dashboards()


def test_building_twice_gives_the_same_text() -> None:
    assert build_dashboards() == build_dashboards()


def test_the_runbook_link_is_a_parameter() -> None:
    text = build_dashboards(runbook_url="https://wiki.example/runbook")["gradwatch-run.json"]
    assert '"url": "https://wiki.example/runbook"' in text


def test_the_model_is_the_classic_one_that_provisioning_takes(dashboard: Panel) -> None:
    assert dashboard["schemaVersion"] == 39
    assert dashboard["uid"] == "gradwatch-run"
    assert {"id", "__inputs", "__requires", "version"}.isdisjoint(dashboard)
    assert dashboard["graphTooltip"] == 1


def test_panel_ids_are_unique_and_follow_the_position(everything: list[Panel]) -> None:
    assert [panel["id"] for panel in everything] == list(range(1, len(everything) + 1))


def test_panel_types_are_known(everything: list[Panel]) -> None:
    assert {panel["type"] for panel in everything} == PANEL_TYPES


def test_panels_stay_on_the_grid(everything: list[Panel]) -> None:
    for panel in everything:
        spot = panel["gridPos"]
        assert set(spot) == {"h", "w", "x", "y"}
        assert min(spot["h"], spot["w"]) >= 1
        assert spot["x"] >= 0
        assert spot["x"] + spot["w"] <= COLUMNS, panel["title"]


def _overlap(one: Panel, other: Panel) -> bool:
    a, b = one["gridPos"], other["gridPos"]
    beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
    below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    return not (beside or below)


def test_no_two_panels_overlap(everything: list[Panel]) -> None:
    for one, other in combinations(everything, 2):
        assert not _overlap(one, other), (one["title"], other["title"])


def test_every_grid_line_is_full_so_that_no_panel_floats_up(everything: list[Panel]) -> None:
    covered = sum(panel["gridPos"]["h"] * panel["gridPos"]["w"] for panel in everything)
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in everything)
    assert covered == COLUMNS * bottom


def test_every_panel_belongs_to_a_heading(dashboard: Panel) -> None:
    headings = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in headings] == ["Verdict", "Trend", "Layers", "gradwatch itself"]
    assert dashboard["panels"][0] is headings[0]
    assert [row["collapsed"] for row in headings] == [False, False, False, True]
    for row in headings:
        assert bool(row["panels"]) == row["collapsed"]


def test_a_collapsed_row_keeps_its_panels_below_itself(dashboard: Panel) -> None:
    for row in dashboard["panels"]:
        for panel in row.get("panels", []):
            assert panel["gridPos"]["y"] > row["gridPos"]["y"]


def test_headings_follow_each_other_downwards(dashboard: Panel) -> None:
    tops = [row["gridPos"]["y"] for row in dashboard["panels"] if row["type"] == "row"]
    assert all(upper < lower for upper, lower in pairwise(tops))


def test_every_panel_has_a_title_a_unit_and_a_text_for_no_value(panels: list[Panel]) -> None:
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["noValue"] == "run finished or not scraped", panel["title"]


def test_titles_are_unique_within_a_row(dashboard: Panel, panels: list[Panel]) -> None:
    assert len({(panel["type"], panel["title"]) for panel in panels}) == len(panels)


def test_every_description_is_two_sentences_what_it_is_and_what_to_do(panels: list[Panel]) -> None:
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["description"].count(". ") + panel["description"].count(": ") >= 1
        assert len(panel["description"]) > 60, panel["title"]


def test_every_ref_id_counts_from_a(panels: list[Panel]) -> None:
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == list("ABCDEFGH")[: len(refs)]
        assert refs, panel["title"]


def test_the_data_source_is_the_variable_everywhere(dashboard: Panel, panels: list[Panel]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asking = [*panels, *(target for panel in panels for target in panel["targets"])]
    asking += dashboard["annotations"]["list"]
    asking += [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for asker in asking:
        assert asker["datasource"] == chosen


def test_variables_are_chained_from_the_data_source_to_the_layer(dashboard: Panel) -> None:
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "run", "rank", "layer"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == 'label_values(gradwatch_info{job=~"$job"}, run)'
    for name in ("rank", "layer"):
        assert 'job=~"$job",run=~"$run"' in variables[name]["query"]["query"]
    assert [name for name, v in variables.items() if v["multi"]] == ["job", "run", "rank"]


def test_the_total_norm_panel_draws_the_limit_on_a_logarithmic_axis(panels: list[Panel]) -> None:
    (panel,) = [p for p in panels if p["title"] == "Total norm" and p["type"] == "timeseries"]
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
def test_the_first_line_is_the_verdict(dashboard: Panel, shown: str) -> None:
    first = [p for p in dashboard["panels"] if p["gridPos"]["y"] == 1]
    assert any(shown in target["expr"] for p in first for target in p["targets"])


def test_a_figure_is_asked_for_once_not_over_the_whole_range(panels: list[Panel]) -> None:
    for panel in panels:
        for target in panel["targets"]:
            now = panel["type"] in {"stat", "table"}
            assert (target["instant"], target["range"]) == (now, not now), panel["title"]


def test_buckets_are_asked_for_as_a_heat_map_and_nothing_else_is(panels: list[Panel]) -> None:
    for panel in panels:
        for target in panel["targets"]:
            assert (target["format"] == "heatmap") == ("_bucket{" in target["expr"])


def test_a_heat_map_of_logarithms_hides_no_negative_cell(panels: list[Panel]) -> None:
    (overview,) = [p for p in panels if p["title"] == "Norm of every layer"]
    assert "log10" in overview["targets"][0]["expr"]
    assert overview["options"]["filterValues"]["le"] < -12
