"""Alertmanager's configuration, and the receiver that prints pages."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = "deploy/alertmanager"


@pytest.fixture(scope="module")
def configuration(repository: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((repository / HERE / "alertmanager.yml").read_text()))


@pytest.mark.servers
def test_amtool_accepts_it(repository: Path, call: Callable[..., str]) -> None:
    assert "SUCCESS" in call("amtool", "check-config", repository / HERE / "alertmanager.yml")


def amlint(repository: Path, configuration: Path) -> subprocess.CompletedProcess[str]:
    rules = f"--rules={repository}/dashboards/rules/*.yml"
    # `nobody` is empty on purpose: an info is to be seen by whoever looks.
    options = ["--strict", "--ignore=empty-receiver", rules]
    command = [Path(sys.executable).with_name("amlint"), "check", *options, configuration]
    return subprocess.run(command, capture_output=True, text=True)


def test_amlint_finds_no_route_that_leads_nowhere_and_no_alert_that_hides_another(
    repository: Path,
) -> None:
    checked = amlint(repository, repository / HERE / "alertmanager.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "code"),
    [
        ("  routes:\n", "  routes:\n    - {receiver: pager}\n", "unreachable-route"),
        ("    equal: [job, run]\n", "", "inhibit-no-equal"),
    ],
)
def test_amlint_would_see_a_mistake(
    repository: Path, tmp_path: Path, right: str, wrong: str, code: str
) -> None:
    text = (repository / HERE / "alertmanager.yml").read_text()
    assert right in text
    (tmp_path / "alertmanager.yml").write_text(text.replace(right, wrong, 1))
    checked = amlint(repository, tmp_path / "alertmanager.yml")
    assert checked.returncode != 0
    assert code in checked.stdout


@pytest.mark.servers
@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "pager"), ("warning", "pager"), ("info", "nobody")]
)
def test_every_severity_reaches_whom_it_concerns(
    repository: Path, call: Callable[..., str], severity: str, receiver: str
) -> None:
    said = call(
        "amtool",
        "config",
        "routes",
        "test",
        f"--config.file={repository / HERE / 'alertmanager.yml'}",
        f"--verify.receivers={receiver}",
        f"severity={severity}",
        "alertname=GradwatchExplodingGradient",
        "run=gpt",
    )
    assert said.splitlines()[0] == receiver


def test_a_critical_alert_waits_for_nothing_and_a_warning_does(
    configuration: dict[str, Any],
) -> None:
    critical, _ = configuration["route"]["routes"]
    assert critical["matchers"] == ["severity = critical"]
    assert critical["group_wait"] == "0s"
    assert configuration["route"]["group_wait"] == "1m"
    assert configuration["route"]["group_by"] == ["alertname", "job", "run"]


def test_a_page_silences_warnings_of_the_same_run_only(configuration: dict[str, Any]) -> None:
    rule, _ = configuration["inhibit_rules"]
    assert rule["source_matchers"][0] == "severity = critical"
    assert rule["target_matchers"][0] == 'severity =~ "warning|info"'
    assert rule["equal"] == ["job", "run"]


def test_a_run_that_is_gone_silences_whatever_else_was_said_of_it(
    configuration: dict[str, Any],
) -> None:
    _, rule = configuration["inhibit_rules"]
    assert rule["source_matchers"] == ["alertname = GradwatchRunDisappeared"]
    assert rule["equal"] == ["job", "run"]


def test_the_receiver_is_the_pager_of_compose(
    configuration: dict[str, Any], compose: dict[str, Any]
) -> None:
    receiver, _ = configuration["receivers"]
    *_, port, host = compose["services"]["pager"]["command"]
    assert host == "0.0.0.0"  # of its container, which publishes nothing
    assert receiver["webhook_configs"][0]["url"] == f"http://pager:{port}/"


@pytest.fixture
def pager(repository: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, repository / HERE / "pager.py", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        _wait_for(url)
        yield url, process
    finally:
        process.terminate()
        process.communicate(timeout=10)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer within 20 s")


def _post(url: str, body: bytes) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return int(refused.code)


PAGE = {
    "version": "4",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "GradwatchTrainingStalled", "severity": "critical"},
            "annotations": {
                "summary": "Run gpt makes no steps any more.",
                "runbook_url": "https://wiki.example/book",
            },
        }
    ],
}


def test_the_pager_prints_one_line_per_alert(
    pager: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = pager
    assert _post(url, json.dumps(PAGE).encode()) == 200
    assert process.stdout is not None
    assert process.stdout.readline() == (
        "firing critical GradwatchTrainingStalled: "
        "Run gpt makes no steps any more. https://wiki.example/book\n"
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"alerts": [{}]}', b'{"alerts": [1]}'])
def test_the_pager_survives_what_is_not_a_page(
    pager: tuple[str, subprocess.Popen[str]], body: bytes
) -> None:
    url, process = pager
    assert _post(url, body) == 400
    assert _post(url, json.dumps(PAGE).encode()) == 200
    assert process.poll() is None
