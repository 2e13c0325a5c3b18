"""Every dashboard as a reader of its JSON sees it, and the real promtool."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradwatch.dashboards import build_dashboards

REPOSITORY = Path(__file__).parents[2]
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$layer": "x"}


@pytest.fixture(scope="session")
def committed() -> Path:
    return REPOSITORY / "dashboards"


@pytest.fixture(scope="session", params=sorted(build_dashboards()))
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(json.loads(build_dashboards()[request.param]))


@pytest.fixture(scope="session")
def run_dashboard() -> dict[str, Any]:
    return dict(json.loads(build_dashboards()["gradwatch-run.json"]))


def _with_nested(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from panel.get("panels", [])


@pytest.fixture(scope="session")
def everything(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Headings and panels, those in collapsed rows too."""
    return list(_with_nested(dashboard["panels"]))


@pytest.fixture(scope="session")
def panels(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [panel for panel in everything if panel["type"] != "row"]


@pytest.fixture(scope="session")
def queries(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> dict[str, str]:
    """Where -> PromQL, with each of Grafana's variables replaced by a value."""
    written = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels
        for target in panel["targets"]
    }
    for mark in dashboard["annotations"]["list"]:
        if "expr" in mark:
            written[f"annotation {mark['name']}"] = mark["expr"]
    return {where: _resolved(query) for where, query in written.items()}


def _resolved(query: str) -> str:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    query = re.sub(r"\$(job|run|rank)\b", ".*", query)
    assert "$" not in query
    return query


@pytest.fixture(scope="session")
def promtool() -> Callable[..., None]:
    """Runs promtool and fails with its words where it is not content."""
    program = shutil.which("promtool")
    if program is None:
        missing = "promtool is missing: apt-get install -y --no-install-recommends prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)

    def run(*arguments: object) -> None:
        done = subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run
