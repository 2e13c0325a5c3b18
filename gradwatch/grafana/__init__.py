"""Grafana through grafana-api: a folder, a data source, dashboards and annotations, as wanted.

    with Server("http://127.0.0.1:3000", credentials()) as server:
        grafana = Grafana(server)
        folder, outcome = grafana.ensure_folder("gradwatch")
        outcome = grafana.push_dashboard(dashboard, folder)

Each says whether it created or updated something, or found it as it should be; done twice, the
second time changes nothing. Of grafana-api its request runner is used, with paths from Grafana's
manual: its own methods know those of 2020.
"""

from __future__ import annotations

from gradwatch.grafana.adapter import Annotation, Grafana, Outcome
from gradwatch.grafana.findings import annotations_of
from gradwatch.grafana.server import Credentials, Server, credentials

__all__ = [
    "Annotation",
    "Credentials",
    "Grafana",
    "Outcome",
    "Server",
    "annotations_of",
    "credentials",
]
