"""The rule file: complete, within the METRICS table, and tested by the real promtool."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from gradwatch.dashboards import (
    Thresholds,
    build_dashboards,
    build_rules,
    prometheus_rule,
    write_rules,
)
from gradwatch.dashboards.alert import duration, words
from gradwatch.dashboards.alerts import alerts as all_alerts
from gradwatch.dashboards.promql import metric_of
from gradwatch.policy import KINDS

RULES = "rules/gradwatch.rules.yml"

SEVERITIES = {
    "GradwatchExplodingGradient": "critical",
    "GradwatchNonFiniteGradient": "critical",
    "GradwatchRankDivergence": "critical",
    "GradwatchRankOutlier": "warning",
    "GradwatchVanishingGradient": "warning",
    "GradwatchUpdateOutOfRange": "warning",
    "GradwatchPrecisionLost": "warning",
    "GradwatchLossRising": "warning",
    "GradwatchLossScaleCollapsed": "warning",
    "GradwatchGradientStuck": "warning",
    "GradwatchParameterUnused": "info",
    "GradwatchGradNormSpiking": "warning",
    "GradwatchGradNormTrend": "warning",
    "GradwatchClippingSaturated": "warning",
    "GradwatchClippedElsewhere": "warning",
    "GradwatchStepsSkipped": "warning",
    "GradwatchNotEnforcing": "critical",
    "GradwatchPolicyRefused": "warning",
    "GradwatchTrainingStalled": "critical",
    "GradwatchExporterDown": "warning",
    "GradwatchRunDisappeared": "critical",
    "GradwatchHookErrors": "warning",
    "GradwatchOverheadHigh": "warning",
    "GradwatchRecordsDropped": "warning",
    "GradwatchSeriesDropped": "info",
    "GradwatchAgentErrors": "warning",
}

WITHOUT_RUN = {"GradwatchAgentErrors"}
"""A node agent speaks for many runs: what ails it has none."""

PAIRS = sorted(
    path.name for path in (Path(__file__).parents[2] / "dashboards/rules/tests").glob("*.yml")
)


def _rules(text: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts() -> list[dict[str, Any]]:
    return [rule for rule in _rules(build_rules()[RULES]) if "alert" in rule]


@pytest.fixture(scope="module")
def tests(committed: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (committed / "rules/tests").glob("*.yml")}


def test_the_committed_file_is_the_built_one(committed: Path) -> None:
    assert (committed / RULES).read_text() == build_rules()[RULES]


def test_writing_gives_the_built_file_in_a_directory_that_did_not_exist(tmp_path: Path) -> None:
    (written,) = write_rules(tmp_path / "new")
    assert written.read_text() == build_rules()[RULES]


def test_the_alerts_are_those_and_their_severities(alerts: list[dict[str, Any]]) -> None:
    assert {rule["alert"]: rule["labels"]["severity"] for rule in alerts} == SEVERITIES


def test_every_summary_is_a_sentence_that_names_the_run(alerts: list[dict[str, Any]]) -> None:
    for rule in alerts:
        named = "instance" if rule["alert"] in WITHOUT_RUN else "run"
        assert f"{{{{ $labels.{named} }}}}" in rule["annotations"]["summary"]
        assert rule["annotations"]["summary"].endswith((".", "; training goes on."))


def test_every_kind_of_anomaly_that_is_no_single_step_raises_an_alert() -> None:
    """One overflow that a loss scaler answers is what the scaler is for."""
    raised = [kind for alert in all_alerts() for kind in alert.events]
    assert sorted(raised) == sorted(set(KINDS) - {"overflow"})


def test_every_description_gives_a_value_and_what_to_do_first(
    alerts: list[dict[str, Any]],
) -> None:
    for rule in alerts:
        assert re.search(r"\$?value \||\.Value \|", rule["annotations"]["description"])
        assert " First " in rule["annotations"]["description"]


def test_the_text_of_what_happened_at_one_moment_asks_for_no_value_of_now() -> None:
    """The run may have recovered or ended by the time that it is read."""
    for alert in all_alerts():
        if alert.events:
            behind = re.findall(r"gradwatch_\w+\{[^}]*\}(.)", alert.description)
            assert set(behind) <= {"["}, alert.name


def test_a_count_that_is_not_there_is_none_or_0_and_never_unknown() -> None:
    for alert in all_alerts():
        for query in re.findall(r"printf `([^`]*)`", alert.description):
            is_count = query.startswith(
                ("count(", "sum(max by", "sum(max_over_time(gradwatch_hook")
            )
            assert not is_count or query.endswith("or vector(0)"), alert.name
        assert "range" not in alert.description or "{{ else }}none" in alert.description


def test_the_runbook_link_is_added_to_every_alert_and_a_parameter() -> None:
    text = build_rules(runbook_url="https://wiki.example/book")[RULES]
    links = {r["alert"]: r["annotations"]["runbook_url"] for r in _rules(text) if "alert" in r}
    assert links == {name: f"https://wiki.example/book#{name.lower()}" for name in SEVERITIES}


def test_the_runbook_has_a_section_for_each_alert_and_for_nothing_else(committed: Path) -> None:
    runbook = (committed.parent / "docs" / "runbook.md").read_text()
    assert set(re.findall(r"^## (Gradwatch\w+)$", runbook, re.MULTILINE)) == set(SEVERITIES)


def test_every_section_of_the_runbook_answers_the_same_four_questions(committed: Path) -> None:
    runbook = (committed.parent / "docs" / "runbook.md").read_text()
    for section in re.split(r"^## ", runbook, flags=re.MULTILINE):
        if section.startswith("Gradwatch"):
            asked = re.findall(r"^### (.+)$", section, re.MULTILINE)
            assert asked == ["What it means", "Look first at", "Do", "When to ignore it"]


def test_every_series_that_the_runbook_asks_for_is_exported(committed: Path) -> None:
    runbook = (committed.parent / "docs" / "runbook.md").read_text()
    asked = set(re.findall(r"(?<!:)\bgradwatch_\w+", runbook))
    assert asked
    for series in asked:
        metric_of(series)


def test_every_query_of_the_runbook_parses(committed: Path) -> None:
    runbook = (committed.parent / "docs" / "runbook.md").read_text()
    queries = [line.strip() for line in runbook.splitlines() if "{run=" in line]
    assert len(queries) > 10
    for query in queries:
        promql.parse(query)


def test_every_series_in_expressions_and_texts_is_exported() -> None:
    text = build_rules()[RULES]
    recorded = set(re.findall(r"- record: (\S+)", text))
    for series in set(re.findall(r"(?<![:\w])gradwatch_\w+", text.replace("-", " "))):
        metric_of(series)
    for series in set(re.findall(r"\b\w+:gradwatch_\w+:\w+", text)):
        assert series in recorded


def test_every_matcher_names_a_label_of_its_series() -> None:
    for series, matchers in re.findall(r"\b(gradwatch_\w+)\{([^}]*)\}", build_rules()[RULES]):
        own = {"job", "run", *metric_of(series).labels}
        assert set(re.findall(r"(\w+)=", matchers)) <= own, series


@pytest.mark.parametrize(
    ("changed", "written"),
    [
        (Thresholds(event_seconds=90), "[90s])) > 0) < 90\n"),
        (Thresholds(stalled_seconds=1800), "mean, 1800)\n"),
        (Thresholds(stalled_seconds=1800), "[30m])"),
        (Thresholds(stalled_factor=2.5), "clamp_min(2.5 *"),
        (Thresholds(stalled_for_seconds=60), "for: 1m\n"),
        (Thresholds(down_for_seconds=45), "for: 45s\n"),
        (Thresholds(goodbye_seconds=7200), "[2h])"),
        (Thresholds(enforcing_seconds=60), "gradwatch_enforcing[1m]"),
        (
            Thresholds(disappeared_for_seconds=900),
            "for: 15m\n        labels:\n          severity: crit",
        ),
        (Thresholds(window_seconds=1800), "increase(gradwatch_steps_total[30m])"),
        (Thresholds(window_seconds=1800), "in the last 30 minutes"),
        (Thresholds(level_seconds=3600), "for: 1h\n"),
        (Thresholds(spike_share=0.5), "0.5 * run:gradwatch_steps:increase, 5\n"),
        (Thresholds(spike_least=7), "0.01 * run:gradwatch_steps:increase, 7\n"),
        (Thresholds(trend_factor=3), "> 3 * quantile_over_time"),
        (Thresholds(trend_for_seconds=480), "for: 8m\n"),
        (Thresholds(clipped_share=0.75), "busiest_rule > 0.75\n"),
        (Thresholds(skipped_share=0.2), "0.2 * run:gradwatch_steps:increase, 10\n"),
        (Thresholds(skipped_least=33), "0.05 * run:gradwatch_steps:increase, 33\n"),
        (Thresholds(overhead_share=0.15), "> 0.15\n"),
    ],
)
def test_every_threshold_reaches_the_file(changed: Thresholds, written: str) -> None:
    assert written not in build_rules()[RULES]
    assert written in build_rules(changed)[RULES].replace("\n              ", " ")


def test_every_threshold_has_such_a_test() -> None:
    marks = test_every_threshold_reaches_the_file.pytestmark  # type: ignore[attr-defined]
    (cases,) = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    changed = {
        field.name
        for thresholds, _ in cases
        for field in fields(Thresholds)
        if getattr(thresholds, field.name) != field.default
    }
    assert changed == {field.name for field in fields(Thresholds)}


def test_a_prometheus_rule_holds_the_same_groups() -> None:
    rule = yaml.safe_load(prometheus_rule(namespace="ml", labels={"release": "prometheus"}))
    assert rule["spec"] == yaml.safe_load(build_rules()[RULES])
    assert rule["metadata"] == {
        "name": "gradwatch",
        "namespace": "ml",
        "labels": {"app.kubernetes.io/name": "gradwatch", "release": "prometheus"},
    }


def test_alerts_link_to_a_dashboard_that_exists_where_grafana_is_known() -> None:
    built = {name.removesuffix(".json") for name in build_dashboards()}
    text = build_rules(grafana_url="https://grafana.example/")[RULES]
    for rule in _rules(text):
        if "alert" in rule:
            link = rule["annotations"]["dashboard_url"]
            uid, query = link.removeprefix("https://grafana.example/d/").split("?", 1)
            assert uid in built
            assert query == "var-run={{ $labels.run | urlquery }}"


@pytest.mark.parametrize(
    ("seconds", "written"), [(45, "45s"), (90, "90s"), (600, "10m"), (43_200, "12h")]
)
def test_durations_are_written_in_the_largest_unit_that_divides_them(
    seconds: int, written: str
) -> None:
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "1 second"), (90, "90 seconds"), (60, "1 minute"), (900, "15 minutes"), (7200, "2 hours")],
)
def test_durations_are_said_as_a_reader_says_them(seconds: int, said: str) -> None:
    assert words(seconds) == said


@pytest.mark.servers
def test_promtool_accepts_the_rules(committed: Path, promtool: Callable[..., None]) -> None:
    promtool("check", "rules", committed / RULES)


@pytest.mark.servers
@pytest.mark.parametrize("name", PAIRS)
def test_alerts_are_silent_just_before_and_fire_at_the_moment(
    committed: Path, promtool: Callable[..., None], name: str
) -> None:
    promtool("test", "rules", committed / "rules" / "tests" / name)


def test_every_alert_is_tested_firing_silent_and_exempt(tests: dict[str, str]) -> None:
    for alert in SEVERITIES:
        (text,) = [text for text in tests.values() if f"alertname: {alert}\n" in text]
        checks = [c for t in yaml.safe_load(text)["tests"] for c in t["alert_rule_test"]]
        assert any(check["exp_alerts"] for check in checks), alert
        assert any(not check["exp_alerts"] for check in checks), alert
        assert "  # Don't alert when " in text, alert


def test_every_firing_is_paired_with_a_silence_just_before(tests: dict[str, str]) -> None:
    for text in tests.values():
        for case in yaml.safe_load(text)["tests"]:
            fired = [bool(check["exp_alerts"]) for check in case["alert_rule_test"]]
            assert not fired[0], case["name"]


def test_no_text_of_an_alert_failed_to_expand(tests: dict[str, str]) -> None:
    for name, text in tests.items():
        assert "error expanding" not in text, name


def test_the_series_that_the_alerts_are_tested_with_are_exported(tests: dict[str, str]) -> None:
    for text in tests.values():
        for series, labels in re.findall(r"'(gradwatch_\w+)\{([^}]*)\}'", text):
            common = () if series.startswith("gradwatch_agent") else ("run", "rank")
            own = {"job", "instance", *common, *metric_of(series).labels}
            given = set(re.findall(r'(\w+)="', labels))
            assert given == own or series.startswith("gradwatch_step_duration"), series
