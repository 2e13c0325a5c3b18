"""Each alert fires for real: a run with a fault for each, side by side, and one in good health.

The rules are those that `gradwatch rules render` writes, with thresholds of seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gradwatch.dashboards.alerts import alerts

pytestmark = [pytest.mark.servers, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("provoking.py")
ALERTS = {alert.name: alert.severity for alert in alerts()}
CANNOT_BE_PROVOKED = {
    "GradwatchGradNormTrend": "it compares with hours of history, and asks that an hour be there",
}
THRESHOLDS = {
    "window_seconds": 12,
    "level_seconds": 2,
    "stalled_seconds": 5,
    "stalled_for_seconds": 1,
    "down_for_seconds": 4,
    "disappeared_for_seconds": 2,
    "overhead_share": 0.15,  # thirty trainings on two cores wait for each other
}
PROVOKED = sorted(ALERTS.keys() - CANNOT_BE_PROVOKED.keys())
HEALTHY = "Healthy"
RANKS = {"RankDivergence": 2, "RankOutlier": 3}
LATE = {"SeriesDropped"}
"""Born with their fault, and so not before it is time."""

NO_RUN = {"GradwatchAgentErrors"}
MOST_SECONDS = 60


def run_of(alert: str) -> str:
    return alert.removeprefix("Gradwatch")


@dataclass
class Seen:
    """What came of the faults."""

    faults: dict[str, float] = field(default_factory=dict)
    """When each began, by run."""

    before: set[tuple[str, str]] = field(default_factory=set)
    """Alerts and their runs before there was a fault."""

    fired: dict[tuple[str, str], float] = field(default_factory=dict)
    """When an alert fired first, by its name and run."""

    pending: set[tuple[str, str]] = field(default_factory=set)
    annotations: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    paged: dict[str, list[float]] = field(default_factory=dict)
    """When the pager was told, by alert, of the run that is there for it."""

    healthy_steps: float = 0.0


@pytest.fixture(scope="module")
def seen(chain, running, wait_for, free_port, tmp_path_factory) -> Iterator[Seen]:
    directory = tmp_path_factory.mktemp("every")
    rules = directory / "rules.yml"
    command = [sys.executable, "-m", "gradwatch", "rules", "render", "-o", str(rules)]
    for name, value in THRESHOLDS.items():
        command += ["--threshold", f"{name}={value}"]
    subprocess.run(command, check=True)
    followed, recordings, go = directory / "followed", directory / "recordings", directory / "go"
    followed.mkdir()
    recordings.mkdir()
    port = free_port()
    serve = [sys.executable, "-m", "gradwatch", "serve", str(followed), "--port", str(port)]
    with ExitStack() as stack:
        monitoring = stack.enter_context(chain(directory, rules))
        target = [{"targets": [f"127.0.0.1:{port}"]}]
        (monitoring.targets / "agent.json").write_text(json.dumps(target))
        stack.enter_context(running(serve, directory / "serve.log"))
        log = directory / "provoking.log"
        provoke = [sys.executable, str(SCRIPT), go, monitoring.targets, recordings, followed]
        stack.enter_context(running(list(map(str, provoke)), log))
        runs = {run_of(alert) for alert in PROVOKED} - LATE | {HEALTHY}
        awaited = {run: RANKS.get(run, 1) for run in runs}

        def scraped() -> bool:
            counts = monitoring.value("count by (run) (gradwatch_steps_total > 0)")
            return {one["metric"]["run"]: int(one["value"][1]) for one in counts} == awaited

        def calm() -> bool:
            """Where a step follows the other at once, gradwatch has a large share of it."""
            alerts = monitoring.active()
            seen.before = {(a["labels"]["alertname"], a["labels"].get("run", "")) for a in alerts}
            return not seen.before

        seen = Seen()
        try:
            wait_for("the first scrape of each", 90, scraped)
            wait_for("the end of alerts on the warm-up", 60, calm)
        except AssertionError as error:
            pytest.fail(f"{error}: {seen.before}\n{log.read_text()}", pytrace=False)
        go.touch()
        deadline = time.monotonic() + MOST_SECONDS
        while not_yet(seen, monitoring) and time.monotonic() < deadline:
            time.sleep(0.5)
            look(monitoring, seen)
        seen.faults = {path.stem: float(path.read_text()) for path in directory.glob("*.fault")}
        steps = monitoring.value(f'gradwatch_steps_total{{run="{HEALTHY}"}}')
        seen.healthy_steps = float(steps[0]["value"][1])
        table(seen)
        yield seen


def not_yet(seen: Seen, monitoring) -> bool:
    for alert in PROVOKED:
        run = "" if alert in NO_RUN else run_of(alert)
        if (alert, run) not in seen.fired:
            return True
        if ALERTS[alert] == "critical":
            seen.paged[alert] = monitoring.pager.firing(alert, run)
            if not seen.paged[alert]:
                return True
    return False


def look(monitoring, seen: Seen) -> None:
    for series in monitoring.value("ALERTS[10m]"):
        labels = series["metric"]
        key = labels["alertname"], labels.get("run", "")
        if labels["alertstate"] == "firing":
            first = float(series["values"][0][0])
            seen.fired[key] = min(first, seen.fired.get(key, first))
        else:
            seen.pending.add(key)
    for alert in monitoring.active():
        labels = alert["labels"]
        key = labels["alertname"], labels.get("run", "")
        seen.annotations.setdefault(key, set()).update(alert["annotations"].values())


def table(seen: Seen) -> None:
    print(f"\n{'alert':<30} {'run':<20} {'fired after':>11}")
    for alert in PROVOKED:
        key = alert, "" if alert in NO_RUN else run_of(alert)
        passed = seen.fired.get(key, float("nan")) - seen.faults.get(run_of(alert), float("nan"))
        print(f"{alert:<30} {run_of(alert):<20} {passed:>9.1f} s")


def test_each_alert_is_provoked_or_said_not_to_be():
    """By run and by reason: what nothing is said of would be an alert that nobody has seen."""
    assert ALERTS.keys() == set(PROVOKED) | CANNOT_BE_PROVOKED.keys()
    assert all(CANNOT_BE_PROVOKED.values())


@pytest.mark.parametrize("alert", PROVOKED)
def test_a_fault_fires_its_alert_and_a_critical_one_goes_to_the_pager(seen, alert):
    run = run_of(alert)
    fired = seen.fired.get((alert, "" if alert in NO_RUN else run))
    assert fired is not None
    assert fired > seen.faults[run]
    if ALERTS[alert] == "critical":
        assert seen.paged[alert]


def test_a_healthy_run_beside_them_has_no_alert(seen):
    assert seen.healthy_steps > 100  # else it had nothing to be judged by
    assert not [alert for alert, run in {*seen.fired, *seen.pending} if run == HEALTHY]


@pytest.mark.parametrize("alert", PROVOKED)
def test_what_an_alert_says_is_whole(seen, alert):
    for text in seen.annotations[alert, "" if alert in NO_RUN else run_of(alert)]:
        assert "error expanding" not in text
        assert "unknown" not in text
        assert "NaN" not in text.replace("hold NaN or Inf", "").replace("is NaN too", "")
