"""The committed dashboards against the types that Grafana publishes; collected where npm is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "dashboard_schema.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard_schema", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def errors(script: ModuleType) -> Callable[[Any], list[str]]:
    schemas = script.kept_schemas()
    return lambda dashboard: list(script.errors_of(dashboard, schemas, set()))


def test_every_dashboard_is_valid_and_nothing_is_accepted_in_vain() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6 dashboards, 0 errors\n", "")


def _panel(dashboard: Any, kind: str) -> Any:
    return next(panel for panel in dashboard["panels"] if panel["type"] == kind)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "a key of the dashboard": lambda d: d.update(grapTooltip=1),
    "refresh as a number": lambda d: d.update(refresh=10),
    "schemaVersion as text": lambda d: d.update(schemaVersion="39"),
    "a shared cursor of a kind there is none of": lambda d: d.update(graphTooltip=7),
    "a panel without a width": lambda d: _panel(d, "stat")["gridPos"].pop("w"),
    "a key of fieldConfig": lambda d: _panel(d, "stat")["fieldConfig"].update(default={}),
    "a mode of thresholds": lambda d: _panel(d, "stat")["fieldConfig"]["defaults"].update(
        thresholds={"mode": "absolut", "steps": []}
    ),
    "a type of panel": lambda d: _panel(d, "timeseries").update(type="timeserie"),
    "an option of a stat": lambda d: _panel(d, "stat")["options"].update(graphMode="lines"),
    "a unit of a line's width": lambda d: _panel(d, "timeseries")["fieldConfig"]["defaults"][
        "custom"
    ].update(lineWidth="2px"),
    "an annotation's key": lambda d: d["annotations"]["list"][0].update(exprs="up"),
    "a variable's key": lambda d: d["templating"]["list"][1].update(multiple=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_a_dashboard_is_found(errors: Callable[[Any], list[str]], fault: str) -> None:
    dashboard = json.loads((REPOSITORY / "dashboards" / "gradwatch-run.json").read_text())
    assert errors(dashboard) == []
    FAULTS[fault](dashboard)
    assert len(errors(dashboard)) == 1


def test_another_schema_than_the_one_that_was_looked_at_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setattr(script, "_made", lambda: {"dashboard": {}})
    with pytest.raises(script.CannotBeMade, match="look at ACCEPTED again"):
        script.kept_schemas()


def test_npm_that_fails_is_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.CannotBeMade, match="npm: "):
        script.kept_schemas()
