"""Prometheus' configuration, in a tree laid out as compose mounts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

HOME = "/etc/prometheus"


@pytest.fixture
def home(mounts: dict[str, dict[str, Path]], tmp_path: Path) -> Path:
    for inside, source in mounts["prometheus"].items():
        target = tmp_path / Path(inside).relative_to(HOME)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    for example in (tmp_path / "targets").rglob("*.example"):
        example.rename(example.with_suffix(""))
    return tmp_path


@pytest.fixture
def configuration(home: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((home / "prometheus.yml").read_text()))


@pytest.mark.servers
def test_promtool_accepts_it_with_the_rules_and_the_example_target(
    home: Path, call: Callable[..., str]
) -> None:
    said = call("promtool", "check", "config", home / "prometheus.yml")
    assert "SUCCESS: 1 rule files found" in said
    assert "WARNING" not in said


@pytest.mark.servers
def test_promtool_would_refuse_a_broken_target_file(home: Path, call: Callable[..., str]) -> None:
    (home / "targets" / "broken.json").write_text('[{"targets": "host:1"}]')
    with pytest.raises(AssertionError, match="checking SD file"):
        call("promtool", "check", "config", home / "prometheus.yml")


def test_every_address_is_a_service_and_a_port_of_the_network(
    configuration: dict[str, Any], compose: dict[str, Any]
) -> None:
    asked = [
        address
        for job in configuration["scrape_configs"]
        for group in job.get("static_configs", [])
        for address in group["targets"]
    ]
    asked += configuration["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    for address in asked:
        host, port = address.split(":")
        service = compose["services"]["prometheus" if host == "127.0.0.1" else host]
        assert f"127.0.0.1:{port}:{port}" in service["ports"]


def test_what_a_run_says_about_itself_wins_over_labels_of_its_target(
    configuration: dict[str, Any],
) -> None:
    runs = [j for j in configuration["scrape_configs"] if j["job_name"].startswith("gradwatch")]
    assert len(runs) == 3
    assert all(job["honor_labels"] for job in runs)


@pytest.mark.parametrize(
    ("name", "target"),
    [("workstation.json", "workstation.lan:9464"), ("nodes/node.json", "node7.lan:8050")],
)
def test_the_examples_are_target_files(home: Path, name: str, target: str) -> None:
    (group,) = json.loads((home / "targets" / name).read_text())
    assert group["targets"] == [target]
    assert {"run", "rank"}.isdisjoint(group["labels"])


def test_no_target_is_in_two_jobs(configuration: dict[str, Any], home: Path) -> None:
    found = [
        path
        for job in configuration["scrape_configs"]
        for discovery in job.get("file_sd_configs", [])
        for pattern in discovery["files"]
        for path in home.glob(pattern)
    ]
    assert len(found) == len(set(found)) == 2
