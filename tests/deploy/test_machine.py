"""One machine without containers: Prometheus, and the node agent as a service of systemd."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch.serve.command import PORT

HERE = "deploy/machine"


@pytest.fixture
def configuration(repository: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((repository / HERE / "prometheus.yml").read_text()))


@pytest.fixture
def unit(repository: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(repository / HERE / "gradwatch-serve.service")
    return parser


@pytest.mark.servers
def test_promtool_accepts_the_configuration_with_the_rules(
    repository: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    shutil.copy(repository / HERE / "prometheus.yml", tmp_path)
    (tmp_path / "rules").symlink_to(repository / "dashboards/rules")
    assert "SUCCESS: 1 rule files found" in call(
        "promtool", "check", "config", tmp_path / "prometheus.yml"
    )


def test_prometheus_asks_the_port_that_the_agent_serves(configuration: dict[str, Any]) -> None:
    (job,) = (one for one in configuration["scrape_configs"] if one["job_name"] == "gradwatch")
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{PORT}"]}]
    assert job["honor_labels"] is True


def test_the_service_is_a_command_that_exists(
    unit: configparser.ConfigParser, tmp_path: Path
) -> None:
    program, *arguments, folder = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "gradwatch"
    assert Path(folder).is_absolute()
    # A folder that is missing is refused last, and before anything is served.
    command = [sys.executable, "-m", "gradwatch", *arguments, tmp_path / "missing"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"}
    )
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_the_service_sees_processes_and_may_change_nothing(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert service["User"] not in ("", "root")
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert {"ReadWritePaths", "PrivatePIDs", "ProtectProc", "ProcSubset"}.isdisjoint(service)


if shutil.which("systemd-analyze") is not None:  # not among what the tests install

    def test_systemd_knows_every_setting_of_the_service(repository: Path) -> None:
        done = subprocess.run(
            ["systemd-analyze", "verify", repository / HERE / "gradwatch-serve.service"],
            capture_output=True,
            text=True,
        )
        said = [line for line in done.stderr.splitlines() if "is not executable" not in line]
        assert said == []
