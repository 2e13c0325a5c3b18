"""The rule file: complete, within the METRICS table, and tested by the real promtool."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from gradwatch.dashboards import Thresholds, build_rules, write_rules
from gradwatch.dashboards.alerts import duration
from gradwatch.dashboards.promql import metric_of

RULES = "rules/gradwatch.rules.yml"

SEVERITIES = {
    "GradwatchExplodingGradient": "critical",
    "GradwatchNonFiniteGradient": "critical",
    "GradwatchTrainingStalled": "critical",
    "GradwatchExporterDown": "warning",
    "GradwatchNotEnforcing": "critical",
}


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
        assert rule["annotations"]["summary"].endswith(".")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]


def test_every_description_gives_a_value_and_what_to_do_first(
    alerts: list[dict[str, Any]],
) -> None:
    for rule in alerts:
        assert "| value |" in rule["annotations"]["description"]
        assert " First " in rule["annotations"]["description"]


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
    ],
)
def test_every_threshold_reaches_the_file(changed: Thresholds, written: str) -> None:
    assert written not in build_rules()[RULES]
    assert written in build_rules(changed)[RULES].replace("\n              ", " ")


@pytest.mark.parametrize(
    ("seconds", "written"), [(45, "45s"), (90, "90s"), (600, "10m"), (43_200, "12h")]
)
def test_durations_are_written_in_the_largest_unit_that_divides_them(
    seconds: int, written: str
) -> None:
    assert duration(seconds) == written


@pytest.mark.servers
def test_promtool_accepts_the_rules(committed: Path, promtool: Callable[..., None]) -> None:
    promtool("check", "rules", committed / RULES)


@pytest.mark.servers
@pytest.mark.parametrize(
    "name", ["exploding", "nonfinite", "stalled", "exporter_down", "not_enforcing"]
)
def test_alerts_are_silent_just_before_and_fire_at_the_moment(
    committed: Path, promtool: Callable[..., None], name: str
) -> None:
    promtool("test", "rules", committed / "rules" / "tests" / f"{name}.yml")


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


def test_the_series_that_the_alerts_are_tested_with_are_exported(tests: dict[str, str]) -> None:
    for text in tests.values():
        for series, labels in re.findall(r"'(gradwatch_\w+)\{([^}]*)\}'", text):
            own = {"job", "instance", "run", "rank", *metric_of(series).labels}
            given = set(re.findall(r'(\w+)="', labels))
            assert given == own or series.startswith("gradwatch_step_duration"), series
