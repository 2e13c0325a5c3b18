"""Alerts and recording rules in, one Prometheus rule file out.

The runbook link is added here, to every alert, so that none can be without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradwatch.dashboards.alerts import (
    THRESHOLDS,
    Alert,
    Recording,
    Thresholds,
    alerts,
    duration,
    recordings,
)

__all__ = ["RULES_FILE", "RUNBOOK_URL", "build_rules", "runbook_link", "write_rules"]

RUNBOOK_URL = "https://github.com/gradwatch/gradwatch/blob/main/docs/runbook.md"
"""Where docs/runbook.md can be read; give your own address where you keep a copy."""

RULES_FILE = "rules/gradwatch.rules.yml"
"""Below the dashboards' directory."""

_HEADER = """\
# Written by gradwatch.dashboards.write_rules. Thresholds are parameters there: change them in
# gradwatch/dashboards/alerts.py or pass your own, and write this file anew.
"""


def build_rules(
    thresholds: Thresholds = THRESHOLDS, *, runbook_url: str = RUNBOOK_URL
) -> dict[str, str]:
    """File name below the dashboards' directory -> text of the rule file."""
    groups = [
        {"name": "gradwatch-recording", "rules": [_recording(rule) for rule in recordings()]},
        {
            "name": "gradwatch-alerts",
            "rules": [_alert(alert, runbook_url) for alert in alerts(thresholds)],
        },
    ]
    text = yaml.dump({"groups": groups}, Dumper=_Readable, sort_keys=False, width=96)
    return {RULES_FILE: _HEADER + text}


def write_rules(
    directory: str | Path,
    thresholds: Thresholds = THRESHOLDS,
    *,
    runbook_url: str = RUNBOOK_URL,
) -> list[Path]:
    """Write the rule file below `directory` and say where."""
    written = []
    for name, text in build_rules(thresholds, runbook_url=runbook_url).items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _recording(rule: Recording) -> dict[str, str]:
    return {"record": rule.record, "expr": rule.expr}


def _alert(alert: Alert, runbook_url: str) -> dict[str, Any]:
    hold = {"for": duration(alert.for_seconds)} if alert.for_seconds else {}
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **hold,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": runbook_link(alert, runbook_url),
        },
    }


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
