"""The rules of Prometheus as a resource of the Prometheus operator."""

from __future__ import annotations

import yaml

from gradwatch.dashboards.rules import RULES_FILE, build_rules

__all__ = ["prometheus_rule"]


def prometheus_rule() -> str:
    """The rules as the text of a PrometheusRule (monitoring.coreos.com/v1)."""
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "gradwatch", "labels": {"app.kubernetes.io/name": "gradwatch"}},
        "spec": yaml.safe_load(build_rules()[RULES_FILE]),
    }
    return yaml.safe_dump(resource, sort_keys=False, width=96)
