"""`gradwatch dashboards push`: what the command line says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwatch.dashboards import build_dashboards
from gradwatch.dashboards.files import read_files
from gradwatch.errors import MonitoringError
from gradwatch.grafana.adapter import UID, Annotation, Grafana
from gradwatch.grafana.findings import annotations_of
from gradwatch.grafana.server import Server, checked_url, credentials
from gradwatch.recording.reader import open_recording
from gradwatch.report.card import printable

__all__ = ["push_command"]


def push_command(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="JSON files. Without it: what `build` writes.",
                       show_default=False),
    ] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", help="Of Grafana.")
    ] = "http://127.0.0.1:3000",
    folder: Annotated[
        str, typer.Option(metavar="NAME", help="The dashboards go there; made if need be.")
    ] = "gradwatch",
    datasource_url: Annotated[
        str | None,
        typer.Option(metavar="URL", show_default=False,
                     help="Of Prometheus, as Grafana reaches it: becomes a data source there."),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(metavar="RECORDING", show_default=False,
                     help="Its warnings and alerts become annotations."),
    ] = None,
) -> None:  # fmt: skip
    """Puts the dashboards into a Grafana; a second time, only what has changed.

    The token of a service account is in GRAFANA_TOKEN, or a user in GRAFANA_USER
    and GRAFANA_PASSWORD. The role Editor is enough; --datasource-url needs Admin.
    """
    if not folder.strip():
        raise typer.BadParameter("must be a name", param_hint="'--folder'")
    dashboards = _built() if directory is None else _read(directory)
    run, annotations = ("", []) if recording is None else _found(recording)
    if datasource_url is not None:
        checked_url(datasource_url, "Prometheus")
    with Server(url, credentials()) as server:
        grafana = Grafana(server)
        print(f"Grafana {printable(grafana.version())} at {server.url}")
        if datasource_url is not None:
            print(f"data source: {grafana.ensure_datasource(datasource_url)}")
        uid, outcome = grafana.ensure_folder(folder.strip())
        print(f"folder {printable(folder.strip())}: {outcome}")
        for dashboard in dashboards:
            outcome = grafana.push_dashboard(dashboard, uid)
            print(f"dashboard {dashboard['uid']}: {outcome}, {server.url}/d/{dashboard['uid']}")
        if recording is not None:
            counts = grafana.annotate(annotations)
            said = ", ".join(f"{counts[kind]} {kind}" for kind in counts)
            print(f"annotations of {printable(run)}: {said}")


def _found(path: Path) -> tuple[str, list[Annotation]]:
    with open_recording(path) as recording:
        return recording.info.run, annotations_of(recording)


def _built() -> list[dict[str, Any]]:
    return [json.loads(text) for text in build_dashboards().values()]


def _read(directory: Path) -> list[dict[str, Any]]:
    """
    Raises:
        MonitoringError: there is none, or one cannot be pushed as it is.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path, held in read_files(directory):
        dashboard = _dashboard(path, held)
        other, _ = found.setdefault(dashboard["uid"], (path, dashboard))
        if other != path:
            raise MonitoringError(f"{path}: has the uid of {other.name}: give it one of its own")
    return [dashboard for _, dashboard in found.values()]


def _dashboard(path: Path, dashboard: Any) -> dict[str, Any]:
    if not isinstance(dashboard, dict) or not isinstance(dashboard.get("title"), str):
        raise MonitoringError(f"{path}: no dashboard: it has no title")
    uid = dashboard.get("uid")
    if not isinstance(uid, str) or not UID.fullmatch(uid):
        raise MonitoringError(
            f"{path}: the uid must be 1 to 40 letters, digits, - and _, so that a second push "
            f"finds the dashboard again. Received: {uid!a}"
        )
    if "__inputs" in dashboard:
        raise MonitoringError(
            f"{path}: exported for sharing: its __inputs are filled in by Grafana's import dialog "
            "only. Export it without that option"
        )
    return dashboard
