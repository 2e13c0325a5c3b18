"""A real Prometheus scrapes a node agent: one target, every run of the machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.servers, pytest.mark.slow]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def query(tmp_path: Path, fetched: Callable[..., str]) -> Iterator[Callable[..., list]]:
    """Starts a Prometheus with the committed rules for targets in `targets.json`; asks it."""
    if shutil.which("prometheus") is None:
        message = "not installed: prometheus; apt-get install prometheus"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    deployed = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = [j for j in deployed["scrape_configs"] if j["job_name"] == "gradwatch-nodes"]
    job["file_sd_configs"] = [{"files": [f"{tmp_path}/targets.json"], "refresh_interval": "1s"}]
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "dashboards/rules/gradwatch.rules.yml")],
        "scrape_configs": [job],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )

    def ask(expression: str) -> list:
        url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
        try:
            return json.loads(fetched(url))["data"]["result"]
        except OSError:
            return []

    yield ask
    process.terminate()
    process.wait(20)


def test_one_target_shows_every_run_and_an_explosion_of_a_killed_one(
    train, serve, query, tmp_path, eventually
):
    healthy, doomed = train("healthy"), train("doomed", rank=1)
    for trainer in (healthy, doomed):
        trainer.steps(60)
    served = serve(tmp_path / "runs")
    authority = urllib.parse.urlsplit(served.url).netloc
    (tmp_path / "targets.json").write_text(json.dumps([{"targets": [authority]}]))
    eventually(lambda: len(query("gradwatch_steps_total == 60")) == 2, 60)
    doomed.steps(5, 1e6, then="die")
    firing = 'ALERTS{alertname="GradwatchExplodingGradient",alertstate="firing"}'
    (alert,) = eventually(lambda: query(firing), 30)
    assert alert["metric"]["run"] == "doomed"
    (state,) = query('gradwatch_run_state{run="doomed",state="crashed"} == 1')
    assert state["metric"]["rank"] == "1"
    pending = 'ALERTS{alertname="GradwatchExporterDown",alertstate="pending",run="doomed"}'
    assert eventually(lambda: query(pending), 10)
    assert not query('ALERTS{run="healthy"}')
    assert len(query('up{job="gradwatch-nodes"} == 1')) == 1
