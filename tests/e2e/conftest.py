"""The real programs on loopback: Prometheus, Alertmanager, Pushgateway, and a pager."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards/rules/gradwatch.rules.yml"
PROGRAMS = ("prometheus", "prometheus-alertmanager", "prometheus-pushgateway")


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        message = f"not installed: apt-get install {' '.join(missing)}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@dataclass
class Pager:
    """A webhook that remembers when it was told of which alert."""

    url: str = ""
    pages: list[tuple[float, dict]] = field(default_factory=list)

    def firing(self, name: str, run: str | None = None) -> list[float]:
        return [
            when
            for when, page in tuple(self.pages)
            for alert in page["alerts"]
            if alert["status"] == "firing" and alert["labels"]["alertname"] == name
            and run in (None, alert["labels"]["run"])
        ]  # fmt: skip


@contextmanager
def paging() -> Iterator[Pager]:
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
    try:
        yield pager
    finally:
        server.shutdown()
        server.server_close()


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as out:
        started = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield started
        finally:
            started.terminate()
            started.wait(10)


def asked(url: str) -> dict | list:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def wait_until(what: str, seconds: float, condition: Callable[[], object]) -> None:
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
    alertmanager: str
    pushgateway: str
    targets: Path
    pager: Pager

    def value(self, query: str) -> list[dict]:
        quoted = urllib.parse.quote(query)
        return asked(f"{self.prometheus}/api/v1/query?query={quoted}")["data"]["result"]

    def active(self) -> list[dict]:
        """Alerts of Prometheus, pending or firing, with what they say."""
        return asked(f"{self.prometheus}/api/v1/alerts")["data"]["alerts"]

    def alerts(self) -> list[dict]:
        """What the Alertmanager holds."""
        return asked(f"{self.alertmanager}/api/v2/alerts")


def scraping(alertmanager: int, pushgateway: int, targets: Path, rules: Path) -> dict:
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]
        },
        "scrape_configs": [
            {
                "job_name": "gradwatch",
                "honor_labels": True,
                "file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
            },
            {
                "job_name": "pushgateway",
                "honor_labels": True,
                "static_configs": [{"targets": [f"127.0.0.1:{pushgateway}"]}],
            },
        ],
    }


@contextmanager
def all_of_it(directory: Path, rules: Path = RULES) -> Iterator[Monitoring]:
    """Prometheus at a 1 s scrape with these rules, and an Alertmanager that pages at once."""
    alertmanager, prometheus, pushgateway = (a_free_port() for _ in range(3))
    targets = directory / "targets"
    targets.mkdir()
    with ExitStack() as stack:
        pager = stack.enter_context(paging())
        route = {"receiver": "pager", "group_wait": "0s", "group_by": ["alertname", "job", "run"]}
        receivers = [{"name": "pager", "webhook_configs": [{"url": pager.url}]}]
        routes = {"route": route, "receivers": receivers}
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(routes))
        config = scraping(alertmanager, pushgateway, targets, rules)
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        commands = {
            alertmanager: [
                "prometheus-alertmanager",
                f"--config.file={directory}/alertmanager.yml",
                f"--storage.path={directory}/alerts",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            ],
            prometheus: [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/tsdb",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            ],
            pushgateway: [
                "prometheus-pushgateway",
                f"--web.listen-address=127.0.0.1:{pushgateway}",
                "--persistence.file=",  # Debian's default is a file of the machine
            ],
        }
        for command in commands.values():
            stack.enter_context(process(command, directory / f"{command[0]}.log"))
        for port in commands:
            ready = f"http://127.0.0.1:{port}/-/ready"
            wait_until(ready, 30, lambda ready=ready: urllib.request.urlopen(ready, timeout=5))
        urls = (f"http://127.0.0.1:{port}" for port in (prometheus, alertmanager, pushgateway))
        yield Monitoring(*urls, targets=targets, pager=pager)


@pytest.fixture(scope="session")
def chain() -> Callable[..., object]:
    """Starts all of it, as a context manager, with its files in a directory."""
    return all_of_it


@pytest.fixture
def monitoring(tmp_path: Path) -> Iterator[Monitoring]:
    with all_of_it(tmp_path) as monitoring:
        yield monitoring


@pytest.fixture(scope="session")
def running() -> Callable[..., object]:
    """A process with its output in a file, ended with the context."""
    return process


@pytest.fixture(scope="session")
def wait_for() -> Callable[[str, float, Callable[[], object]], None]:
    return wait_until


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    return a_free_port
