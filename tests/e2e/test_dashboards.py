"""Every query of every dashboard has data behind a real Prometheus, and the rules are there."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERYTHING = Path(__file__).with_name("everything.py")

pytestmark = [pytest.mark.servers, pytest.mark.slow]


def gradwatch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradwatch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def runs(tmp_path, monitoring, running, wait_for, free_port):
    """A demo that explodes, two ranks, and a run that accumulates, which a node agent follows."""
    port, targets = free_port(), monitoring.targets
    (tmp_path / "runs").mkdir()
    target = f'[{{"targets": ["127.0.0.1:{port}"]}}]'
    (targets / "agent.json").write_text(target)
    own = [sys.executable, str(EVERYTHING)]
    cli = [sys.executable, "-m", "gradwatch"]
    where = [str(targets), str(tmp_path / "runs"), monitoring.pushgateway]
    commands = {
        **{way: [*own, way, *where] for way in ("ranks", "accumulating", "ending")},
        "agent": [*cli, "serve", str(tmp_path / "runs"), "--port", str(port)],
        "demo": [
            *cli, "demo", "--loop", "--plain", "--steps", "240", "--step-seconds", "0.1",
            "--port", "0", "--recording", str(tmp_path / "demo"), "--discovery", str(targets),
        ],
    }  # fmt: skip
    with ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(running(command, tmp_path / f"{name}.log"))
        for what, query in {
            "an alert of the demo": 'ALERTS{alertname="GradwatchExplodingGradient"}',
            "the own norms of two ranks": "count(gradwatch_local_norm) == 2",
            "a noise scale": "gradwatch_noise_scale",
            "a loss scale by way of the agent": "gradwatch_loss_scale",
            "the agent itself": "gradwatch_agent_recordings",
            "the summary of a run that has ended": "gradwatch_end_state",
            "shares of a quarter of an hour": "run:gradwatch_clipped_share:busiest_rule",
        }.items():
            wait_for(what, 180, lambda query=query: monitoring.value(query))
        yield monitoring


def test_every_query_has_data_while_runs_go_on_and_the_rules_are_loaded(runs) -> None:
    asking = ["dashboards", "check", str(ROOT / "dashboards"), "--prometheus", runs.prometheus]
    checked = gradwatch(*asking, "--scrape-interval", "1", "--hours", "0.05", "--strict")
    print(f"\n{checked.stdout}")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("0 failed") == 6

    rules = gradwatch("rules", "check", "--prometheus", runs.prometheus)
    print(rules.stdout)
    assert rules.returncode == 0, rules.stdout + rules.stderr
    assert "0 changed, 0 failed; alerts go to 1 Alertmanager" in rules.stdout


def test_no_data_a_refused_query_and_rules_that_nobody_loaded_are_told(
    monitoring, tmp_path
) -> None:
    """The Prometheus is real and has the rules, but no run has ever been scraped."""
    copies = tmp_path / "copies"
    copies.mkdir()
    text = (ROOT / "dashboards/gradwatch-run.json").read_text()
    broken = text.replace('"expr": "sum by (run) (max by', '"expr": "sum by (run)) (max by', 1)
    assert broken != text
    (copies / "run.json").write_text(broken)
    checked = gradwatch("dashboards", "check", str(copies), "--prometheus", monitoring.prometheus)
    assert checked.returncode == 1
    assert "EMPTY variable run A: no series here has that label" in checked.stdout
    assert "EMPTY Total norm A: no data" in checked.stdout
    assert "ERROR Open anomalies A: " in checked.stdout
    assert "parse error" in checked.stdout
    assert "needs a loss scaler" not in checked.stdout

    changed = gradwatch("rules", "check", "--prometheus", f"{monitoring.prometheus}/nothing")
    assert changed.returncode == 2
    assert "path prefix" in changed.stderr
