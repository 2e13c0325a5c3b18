"""What a reader of any dashboard may rely on, checked in its JSON."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

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
    for text in build_dashboards(runbook_url="https://wiki.example/runbook").values():
        assert '"url": "https://wiki.example/runbook"' in text


def test_the_model_is_the_classic_one_that_provisioning_takes(dashboard: Panel) -> None:
    assert dashboard["schemaVersion"] == 39
    assert f"{dashboard['uid']}.json" in build_dashboards()
    assert {"id", "__inputs", "__requires", "version"}.isdisjoint(dashboard)
    assert dashboard["graphTooltip"] == 1


def test_panel_ids_are_unique_and_follow_the_position(everything: list[Panel]) -> None:
    assert [panel["id"] for panel in everything] == list(range(1, len(everything) + 1))


def test_panel_types_are_known(everything: list[Panel]) -> None:
    assert {panel["type"] for panel in everything} <= PANEL_TYPES


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
    assert dashboard["panels"][0] is headings[0]
    assert not headings[0]["collapsed"]
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
        assert refs == list("ABCDEFGHI")[: len(refs)]
        assert refs, panel["title"]


def test_the_data_source_is_the_variable_everywhere(dashboard: Panel, panels: list[Panel]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asking = [*panels, *(target for panel in panels for target in panel["targets"])]
    asking += [mark for mark in dashboard["annotations"]["list"] if "expr" in mark]
    asking += [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for asker in asking:
        assert asker["datasource"] == chosen


def test_findings_that_were_pushed_are_shown_by_their_tag(dashboard: Panel) -> None:
    (mark,) = (mark for mark in dashboard["annotations"]["list"] if "expr" not in mark)
    assert mark["datasource"] == {"type": "grafana", "uid": "-- Grafana --"}
    assert mark["target"]["tags"] == ["gradwatch"]
    assert mark["enable"]


CHAINS = {
    "gradwatch-overview": ["datasource", "job", "run"],
    "gradwatch-run": ["datasource", "job", "run", "rank"],
    "gradwatch-layer": ["datasource", "job", "run", "layer"],
    "gradwatch-clipping": ["datasource", "job", "run", "rank"],
    "gradwatch-distributed": ["datasource", "job", "run", "rank"],
    "gradwatch-exporter": ["datasource", "job", "run", "rank"],
}


def test_variables_are_chained_from_the_data_source_down(dashboard: Panel) -> None:
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert list(variables) == CHAINS[dashboard["uid"]]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == 'label_values(gradwatch_info{job=~"$job"}, run)'
    for name in ("rank", "layer"):
        if name in variables:
            assert 'job=~"$job",run=~"$run"' in variables[name]["query"]["query"]
    single = [name for name, v in variables.items() if not v["multi"]]
    assert single == [name for name in variables if name in ("datasource", "layer")]


def test_no_query_asks_for_a_variable_that_the_dashboard_lacks(
    dashboard: Panel, panels: list[Panel]
) -> None:
    known = {v["name"] for v in dashboard["templating"]["list"]}
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [mark["expr"] for mark in dashboard["annotations"]["list"] if "expr" in mark]
    for expression in expressions:
        named = {name for name in re.findall(r"\$(\w+)", expression) if not name.startswith("__")}
        assert named <= known, expression


def test_links_lead_to_dashboards_and_variables_that_exist(panels: list[Panel]) -> None:
    for panel in panels:
        headings = panel["fieldConfig"]["overrides"]
        shown = {
            t["options"]["renameByName"][name]
            for t in panel.get("transformations", ())
            if t["id"] == "organize"
            for name in t["options"]["renameByName"]
        }
        links = [
            link
            for override in headings
            for item in override["properties"]
            if item["id"] == "links"
            for link in item["value"]
        ]
        for link in links:
            uid = re.match(r"/d/([\w-]+)\?", link["url"])
            assert uid is not None
            chosen = dict(re.findall(r"var-(\w+)=\$\{__data\.fields\.(\w+)\}", link["url"]))
            assert chosen
            assert set(chosen) <= set(CHAINS[uid[1]])
            assert set(chosen.values()) <= shown


def test_every_dashboard_leads_to_the_others_with_its_run_and_time(dashboard: Panel) -> None:
    siblings = dashboard["links"][0]
    assert siblings["tags"] == ["gradwatch"]
    assert set(siblings["tags"]) <= set(dashboard["tags"])
    assert siblings["includeVars"]
    assert siblings["keepTime"]


def test_a_threshold_is_a_line_across_the_figure(panels: list[Panel]) -> None:
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        if panel["type"] == "timeseries" and "thresholds" in defaults:
            assert defaults["custom"]["thresholdsStyle"] == {"mode": "dashed"}
            assert defaults["thresholds"]["steps"][0] == {"color": "transparent", "value": None}


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
    for panel in panels:
        if "log10" in panel["targets"][0]["expr"]:
            assert panel["options"]["filterValues"]["le"] < -12
