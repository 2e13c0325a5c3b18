"""Grafana's provisioning files against schemas of the keys that its manual documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

PROVISIONING = "deploy/grafana/provisioning"

DATASOURCE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "uid", "type", "access", "url"],
    "properties": {
        "name": {"type": "string"},
        "uid": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "type": {"enum": ["prometheus", "alertmanager"]},
        "access": {"const": "proxy"},
        "url": {"type": "string", "pattern": r"^http://[a-z]+:\d+$"},
        "isDefault": {"type": "boolean"},
        "editable": {"const": False},
        "jsonData": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "httpMethod": {"enum": ["POST", "GET"]},
                "timeInterval": {"type": "string", "pattern": r"^\d+s$"},
                "implementation": {"enum": ["prometheus", "mimir", "cortex"]},
                "handleGrafanaManagedAlerts": {"type": "boolean"},
            },
        },
    },
}
PROVIDER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "type", "options", "allowUiUpdates"],
    "properties": {
        "name": {"type": "string"},
        "orgId": {"type": "integer", "minimum": 1},
        "folder": {"type": "string"},
        "type": {"const": "file"},
        "disableDeletion": {"type": "boolean"},
        "allowUiUpdates": {"const": False},
        "updateIntervalSeconds": {"type": "integer", "minimum": 10},
        "options": {
            "type": "object",
            "additionalProperties": False,
            "required": ["path"],
            "properties": {
                "path": {"type": "string", "pattern": "^/"},
                "foldersFromFilesStructure": {"type": "boolean"},
            },
        },
    },
}


def _file_of(key: str, item: dict[str, Any]) -> dict[str, Any]:
    listed = {"type": "array", "minItems": 1, "items": item}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", key],
        "properties": {"apiVersion": {"const": 1}, key: listed},
    }


SCHEMAS = {
    "datasources": _file_of("datasources", DATASOURCE),
    "dashboards": _file_of("providers", PROVIDER),
}


@pytest.fixture
def read(repository: Path) -> Any:
    def of(kind: str) -> dict[str, Any]:
        (path,) = (repository / PROVISIONING / kind).iterdir()
        return dict(yaml.safe_load(path.read_text()))

    return of


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_file_has_only_documented_keys(read: Any, kind: str) -> None:
    jsonschema.validate(read(kind), SCHEMAS[kind])


def test_the_schema_refuses_an_unknown_key(read: Any) -> None:
    misspelt = read("dashboards")
    misspelt["providers"][0]["allowUIUpdates"] = False
    with pytest.raises(jsonschema.ValidationError, match="allowUIUpdates"):
        jsonschema.validate(misspelt, SCHEMAS["dashboards"])


def test_exactly_one_data_source_is_the_default_and_uids_differ(read: Any) -> None:
    sources = read("datasources")["datasources"]
    assert [s["type"] for s in sources if s.get("isDefault")] == ["prometheus"]
    assert len({source["uid"] for source in sources}) == len(sources)


def test_data_sources_are_services_of_compose(read: Any, compose: dict[str, Any]) -> None:
    for source in read("datasources")["datasources"]:
        service, port = source["url"].removeprefix("http://").split(":")
        assert f"127.0.0.1:{port}:{port}" in compose["services"][service]["ports"]


def test_the_provider_reads_the_dashboards_that_compose_mounts(
    read: Any, mounts: dict[str, dict[str, Path]]
) -> None:
    (provider,) = read("dashboards")["providers"]
    assert (mounts["grafana"][provider["options"]["path"]] / "gradwatch-run.json").is_file()


def test_the_home_dashboard_is_mounted(
    compose: dict[str, Any], mounts: dict[str, dict[str, Path]]
) -> None:
    home = Path(
        compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    )
    assert (mounts["grafana"][str(home.parent)] / home.name).is_file()


def test_provisioning_is_mounted_where_grafana_looks(mounts: dict[str, dict[str, Path]]) -> None:
    for kind in SCHEMAS:
        assert f"/etc/grafana/provisioning/{kind}" in mounts["grafana"]


def test_the_scrape_interval_is_the_one_that_rate_intervals_are_made_from(
    read: Any, repository: Path
) -> None:
    prometheus = yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text())
    told = read("datasources")["datasources"][0]["jsonData"]["timeInterval"]
    assert told == prometheus["global"]["scrape_interval"]
