"""The whole way with the real programs: a trainer explodes and somebody's pager goes.

demo -> exporter -> Prometheus (the rules of dashboards/) -> Alertmanager -> webhook
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import gradwatch

ROOT = Path(__file__).parents[2]
PROGRAMS = ("prometheus", "prometheus-alertmanager")

pytestmark = [pytest.mark.servers, pytest.mark.slow]


@pytest.fixture(autouse=True)
def programs() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        message = f"not installed: {missing}; apt-get install prometheus prometheus-alertmanager"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@dataclass
class Pager:
    """A webhook that remembers when it was told of which alert."""

    url: str = ""
    pages: list[tuple[float, dict]] = field(default_factory=list)

    def firing(self, name: str) -> list[float]:
        return [
            when
            for when, page in self.pages
            for alert in page["alerts"]
            if alert["status"] == "firing" and alert["labels"]["alertname"] == name
        ]


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()

    class Webhook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            pager.pages.append((time.time(), json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    pager.url = f"http://127.0.0.1:{server.server_port}/"
    yield pager
    server.shutdown()
    server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(10)


def asked(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def wait_for(what: str, seconds: float, condition) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.1)


@dataclass
class Monitoring:
    prometheus: str
    targets: Path

    def value(self, query: str) -> list[dict]:
        quoted = urllib.parse.quote(query)
        return asked(f"{self.prometheus}/api/v1/query?query={quoted}")["data"]["result"]


@pytest.fixture
def monitoring(tmp_path: Path, pager: Pager) -> Iterator[Monitoring]:
    """Prometheus at a 1 s scrape with our rules, and an Alertmanager that pages at once."""
    alertmanager, prometheus = free_port(), free_port()
    targets = tmp_path / "targets"
    targets.mkdir()
    routes = {
        "route": {"receiver": "pager", "group_wait": "0s", "group_by": ["alertname", "job", "run"]},
        "receivers": [{"name": "pager", "webhook_configs": [{"url": pager.url}]}],
    }
    scraping = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "dashboards/rules/gradwatch.rules.yml")],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]
        },
        "scrape_configs": [
            {
                "job_name": "gradwatch",
                "file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
            }
        ],
    }
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(routes))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scraping))
    with (
        running(
            [
                "prometheus-alertmanager",
                f"--config.file={tmp_path}/alertmanager.yml",
                f"--storage.path={tmp_path}/alerts",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            ],
            tmp_path / "alertmanager.log",
        ),
        running(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            ],
            tmp_path / "prometheus.log",
        ),
    ):
        for port in (alertmanager, prometheus):
            ready = f"http://127.0.0.1:{port}/-/ready"
            wait_for(ready, 30, lambda ready=ready: urllib.request.urlopen(ready, timeout=5))
        yield Monitoring(f"http://127.0.0.1:{prometheus}", targets)


STEPS, STEP_SECONDS = 400, 0.08


def train(tmp_path: Path, monitoring: Monitoring, fault: str) -> tuple[gradwatch.Recording, str]:
    """Runs the demo to its end, scraped from before the fault."""
    command = [
        sys.executable, "-m", "gradwatch", "demo", "--plain", "--fault", fault,
        "--steps", str(STEPS), "--step-seconds", str(STEP_SECONDS), "--seed", "0",
        "--port", str(free_port()), "--recording", str(tmp_path / "runs"),
        "--discovery", str(monitoring.targets),
    ]  # fmt: skip
    with running(command, tmp_path / "demo.log") as demo:
        up = 'up{job="gradwatch"} == 1'
        wait_for("the first scrape", 60, lambda: monitoring.value(up))
        demo.wait(180)
    said = (tmp_path / "demo.log").read_text()
    assert demo.returncode == 0, said
    return gradwatch.open_recording(tmp_path / "runs"), said


def test_an_explosion_pages_within_5_seconds_of_the_step(tmp_path, monitoring, pager):
    recording, said = train(tmp_path, monitoring, "lr")
    found = [anomaly for anomaly in recording.anomalies() if anomaly.kind == "exploding"]
    assert found, said
    (broken,) = recording.records(STEPS // 2, STEPS // 2 + 1)
    wait_for("the page", 10, lambda: pager.firing("GradwatchExplodingGradient"))
    latency = pager.firing("GradwatchExplodingGradient")[0] - broken.time
    print(f"\nfrom the step that the fault hit to the page: {latency:.2f} s")
    assert 0 < latency < 5
    assert {page["groupLabels"]["run"] for _, page in pager.pages} == {recording.info.run}


def test_a_healthy_run_of_the_same_length_pages_nobody(tmp_path, monitoring, pager):
    recording, _ = train(tmp_path, monitoring, "none")
    assert len(recording) == STEPS
    time.sleep(5)
    assert not pager.pages
