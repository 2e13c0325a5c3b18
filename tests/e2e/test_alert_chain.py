"""The whole way with the real programs: a trainer explodes and somebody's pager goes.

demo -> exporter -> Prometheus (the rules of dashboards/) -> Alertmanager -> webhook
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gradwatch

pytestmark = [pytest.mark.servers, pytest.mark.slow]

STEPS, STEP_SECONDS = 400, 0.08


@pytest.fixture
def train(
    tmp_path: Path, monitoring, running, wait_for, free_port
) -> Callable[[str], tuple[gradwatch.Recording, str]]:
    """Runs the demo to its end, scraped from before the fault."""

    def train(fault: str) -> tuple[gradwatch.Recording, str]:
        command = [
            sys.executable, "-m", "gradwatch", "demo", "--plain", "--fault", fault,
            "--steps", str(STEPS), "--step-seconds", str(STEP_SECONDS), "--seed", "0",
            "--port", str(free_port()), "--recording", str(tmp_path / "runs"),
            "--discovery", str(monitoring.targets),
        ]  # fmt: skip
        log = tmp_path / "demo.log"
        with running(command, log) as demo:
            up = 'up{job="gradwatch"} == 1'
            # A process that starts beside others on two cores imports torch for half a minute.
            wait_for(
                "the first scrape", 150, lambda: demo.poll() is not None or monitoring.value(up)
            )
            assert demo.poll() is None, log.read_text()
            demo.wait(180)
        said = log.read_text()
        assert demo.returncode == 0, said
        return gradwatch.open_recording(tmp_path / "runs"), said

    return train


def test_an_explosion_pages_within_5_seconds_of_the_step(train, monitoring, wait_for):
    pager = monitoring.pager
    recording, said = train("lr")
    found = [anomaly for anomaly in recording.anomalies() if anomaly.kind == "exploding"]
    assert found, said
    (broken,) = recording.records(STEPS // 2, STEPS // 2 + 1)
    wait_for("the page", 10, lambda: pager.firing("GradwatchExplodingGradient"))
    latency = pager.firing("GradwatchExplodingGradient")[0] - broken.time
    print(f"\nfrom the step that the fault hit to the page: {latency:.2f} s")
    assert 0 < latency < 5
    assert {page["groupLabels"]["run"] for _, page in pager.pages} == {recording.info.run}


def test_a_healthy_run_of_the_same_length_pages_nobody(train, monitoring):
    recording, _ = train("none")
    assert len(recording) == STEPS
    time.sleep(5)
    assert not monitoring.pager.pages
