"""The demo's faults in runs of Keras, seen by a real Prometheus with the rules of dashboards/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import monitoring, programs, wait_until

__all__ = ["monitoring", "programs"]  # fixtures

TRAINER = Path(__file__).with_name("faulty.py")
ALERTS = {
    "lr": 'ALERTS{alertname="GradwatchExplodingGradient",alertstate="firing",run="keras-lr"}',
    "loss": 'ALERTS{alertname="GradwatchExplodingGradient",alertstate="firing",run="keras-loss"}',
    "nan": 'ALERTS{alertname="GradwatchNonFiniteGradient",alertstate="firing",run="keras-nan"}',
    "dead": 'gradwatch_events_total{event="vanishing",run="keras-dead"} > 0',
}


@pytest.mark.servers
@pytest.mark.slow
def test_the_demos_faults_raise_the_same_alerts_from_keras(request, tmp_path):
    monitoring = request.getfixturevalue("monitoring")
    command = [sys.executable, str(TRAINER), str(monitoring.targets), "none", *ALERTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for query in ALERTS.values():
        recent = f"max_over_time(({query})[5m:1s])"
        wait_until(query, 20, lambda recent=recent: monitoring.value(recent))
    assert monitoring.value('max_over_time(up{job="gradwatch"}[5m])')
    # The share of clipped steps of a run that has just begun is a guess of few scrapes: that alert
    # waits for minutes, and is pending at times meanwhile.
    fired = 'ALERTS{run="keras-none",alertstate="firing"}'
    pending = 'ALERTS{run="keras-none",alertname!="GradwatchClippingSaturated"}'
    assert not monitoring.value(f"max_over_time({fired}[5m])")
    assert not monitoring.value(f"max_over_time({pending}[5m])")
    paged = {page["groupLabels"]["run"] for _, page in monitoring.pager.pages}
    assert {"keras-lr", "keras-loss", "keras-nan"} <= paged
    assert "keras-none" not in paged
