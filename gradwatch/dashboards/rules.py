"""Alerts and recording rules in, a rule file for Prometheus or a PrometheusRule for Kubernetes out.

Links are added here, to every alert, so that none can be without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gradwatch.dashboards.alert import THRESHOLDS, Alert, Recording, Thresholds, duration
from gradwatch.dashboards.alerts import alerts, recordings

__all__ = [
    "RULES_FILE",
    "RUNBOOK_URL",
    "build_rules",
    "prometheus_rule",
    "rule_groups",
    "runbook_link",
    "write_rules",
]

RUNBOOK_URL = "https://github.com/gradwatch/gradwatch/blob/main/docs/runbook.md"
"""Where docs/runbook.md can be read; give your own address where you keep a copy."""

RULES_FILE = "rules/gradwatch.rules.yml"
"""Below the dashboards' directory."""

_HEADER = """\
# Written by gradwatch.dashboards.write_rules. Thresholds are parameters there: change them in
# gradwatch/dashboards/alert.py or pass your own, and write this file anew.
"""

_KUBERNETES_HEADER = """\
# Written by `gradwatch rules render --format kubernetes`: the rules of gradwatch.rules.yml for the
# Prometheus operator. Your operator may look for a label: give it with --label.
"""


def rule_groups(
    thresholds: Thresholds = THRESHOLDS,
    *,
    runbook_url: str = RUNBOOK_URL,
    grafana_url: str | None = None,
) -> dict[str, Any]:
    """The rules as data, in the form of a rule file.

    Args:
        runbook_url: where docs/runbook.md is; each alert links to its section.
        grafana_url: where Grafana is; each alert links to the dashboard that shows it best. None
            leaves that link out.
    """
    return {
        "groups": [
            {
                "name": "gradwatch-recording",
                "rules": [_recording(rule) for rule in recordings(thresholds)],
            },
            {
                "name": "gradwatch-alerts",
                "rules": [_alert(alert, runbook_url, grafana_url) for alert in alerts(thresholds)],
            },
        ]
    }


def build_rules(
    thresholds: Thresholds = THRESHOLDS,
    *,
    runbook_url: str = RUNBOOK_URL,
    grafana_url: str | None = None,
) -> dict[str, str]:
    """File name below the dashboards' directory -> text of the rule file."""
    groups = rule_groups(thresholds, runbook_url=runbook_url, grafana_url=grafana_url)
    return {RULES_FILE: _HEADER + _yaml(groups)}


def prometheus_rule(
    thresholds: Thresholds = THRESHOLDS,
    *,
    runbook_url: str = RUNBOOK_URL,
    grafana_url: str | None = None,
    namespace: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> str:
    """The same rules as the text of a PrometheusRule (monitoring.coreos.com/v1).

    Args:
        labels: beside `app.kubernetes.io/name`; an operator selects rules by them.
    """
    metadata: dict[str, Any] = {"name": "gradwatch"}
    if namespace is not None:
        metadata["namespace"] = namespace
    metadata["labels"] = {"app.kubernetes.io/name": "gradwatch", **(labels or {})}
    return _KUBERNETES_HEADER + _yaml(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": metadata,
            "spec": rule_groups(thresholds, runbook_url=runbook_url, grafana_url=grafana_url),
        }
    )


def write_rules(
    directory: str | Path,
    thresholds: Thresholds = THRESHOLDS,
    *,
    runbook_url: str = RUNBOOK_URL,
    grafana_url: str | None = None,
) -> list[Path]:
    """Write the rule file below `directory` and say where."""
    built = build_rules(thresholds, runbook_url=runbook_url, grafana_url=grafana_url)
    written = []
    for name, text in built.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _recording(rule: Recording) -> dict[str, str]:
    return {"record": rule.record, "expr": rule.expr}


def _alert(alert: Alert, runbook_url: str, grafana_url: str | None) -> dict[str, Any]:
    hold = {"for": duration(alert.for_seconds)} if alert.for_seconds else {}
    links = {"runbook_url": runbook_link(alert, runbook_url)}
    if grafana_url is not None:
        board = f"{grafana_url.rstrip('/')}/d/{alert.dashboard}"
        links["dashboard_url"] = board + "?var-run={{ $labels.run | urlquery }}"
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **hold,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.description, **links},
    }


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Readable, sort_keys=False, width=96)


def runbook_link(alert: Alert, runbook_url: str = RUNBOOK_URL) -> str:
    """Where the runbook says what to do about an alert."""
    return f"{runbook_url}#{alert.name.lower()}"


class _Readable(yaml.SafeDumper):
    """Writes expressions as they stand and prose folded, neither of them quoted."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else ">" if len(text) > 60 and " " in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)
