"""Each alert fires for real: a run with a fault for each, side by side, and one in good health.

The rules are those that `gradwatch rules render` writes, with thresholds of seconds. No alert may
be there before the faults begin. What no run can provoke within a test is in `CANNOT_BE_PROVOKED`:
GradwatchGradNormTrend compares with the median of six hours, and is silent in the first hour.
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
from tests.e2e.provoking import HEALTHY, PROVOCATIONS

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.alone]

SCRIPT = Path(__file__).with_name("provoking.py")
SEVERITY_OF = {alert.name: alert.severity for alert in alerts()}
PROVOKED = sorted(f"Gradwatch{run}" for run in PROVOCATIONS if run != HEALTHY)
CRITICAL = [alert for alert in PROVOKED if SEVERITY_OF[alert] == "critical"]
CANNOT_BE_PROVOKED = {
    "GradwatchGradNormTrend": "it asks that the series be an hour old",
}
WITHOUT_RUN = {"GradwatchAgentErrors"}
THRESHOLDS = {
    "window_seconds": 12,
    "level_seconds": 2,
    "stalled_seconds": 5,
    "stalled_for_seconds": 1,
    "down_for_seconds": 4,
    "disappeared_for_seconds": 2,
    "overhead_share": 0.15,  # thirty trainings on two cores wait for each other
}
MOST_SECONDS = 60

Key = tuple[str, str]
"""An alert, and the run that it is about; "" where it is about none."""


def run_of(alert: str) -> str:
    return alert.removeprefix("Gradwatch")


def key_of(alert: str) -> Key:
    return alert, "" if alert in WITHOUT_RUN else run_of(alert)


def key_in(labels: dict[str, str]) -> Key:
    return labels["alertname"], labels.get("run", "")


@dataclass
class Seen:
    """What came of the faults."""

    faults: dict[str, float] = field(default_factory=dict)
    """When each began, by run."""

    fired: dict[Key, float] = field(default_factory=dict)
    """When each alert fired first."""

    pending: set[Key] = field(default_factory=set)
    annotations: dict[Key, set[str]] = field(default_factory=dict)
    paged: set[str] = field(default_factory=set)
    """Critical alerts that the pager was told of."""

    healthy_steps: float = 0.0

    def look(self, monitoring) -> None:
        for series in monitoring.value("ALERTS[10m]"):
            key = key_in(series["metric"])
            if series["metric"]["alertstate"] == "firing":
                first = float(series["values"][0][0])
                self.fired[key] = min(first, self.fired.get(key, first))
            else:
                self.pending.add(key)
        for alert in monitoring.active():
            texts = self.annotations.setdefault(key_in(alert["labels"]), set())
            texts.update(alert["annotations"].values())
        self.paged = {
            alert for alert in CRITICAL if monitoring.pager.firing(alert, run_of(alert))
        }  # fmt: skip

    @property
    def all_of_it(self) -> bool:
        return self.fired.keys() >= set(map(key_of, PROVOKED)) and self.paged == set(CRITICAL)


OF_THE_MACHINE = {"GradwatchOverheadHigh", "GradwatchTrainingStalled", "GradwatchExporterDown"}
"""With thresholds of seconds, a core that somebody else takes for so long is a stall."""


def render(rules: Path) -> None:
    command = [sys.executable, "-m", "gradwatch", "rules", "render", "-o", str(rules)]
    for name, value in THRESHOLDS.items():
        command += ["--threshold", f"{name}={value}"]
    subprocess.run(command, check=True)


def wait_for_good_health(monitoring, wait_for, log: Path) -> None:
    awaited = {run: made.ranks for run, made in PROVOCATIONS.items() if not made.is_born_with_it}
    there: set[Key] = set()

    def scraped() -> bool:
        counts = monitoring.value("count by (run) (gradwatch_steps_total > 0)")
        return {one["metric"]["run"]: int(one["value"][1]) for one in counts} == awaited

    def calm() -> bool:
        """Where a step follows the other at once, gradwatch has a large share of it."""
        there.clear()
        there.update(key_in(alert["labels"]) for alert in monitoring.active())
        return not there

    try:
        wait_for("the first scrape of each", 90, scraped)
        wait_for("the end of alerts on the warm-up", 60, calm)
    except AssertionError as error:
        pytest.fail(f"{error}: {there}\n{log.read_text()}", pytrace=False)


@pytest.fixture
def seen(chain, running, wait_for, free_port, tmp_path) -> Iterator[Seen]:
    rules, log, go = (tmp_path / name for name in ("rules.yml", "provoking.log", "go"))
    recordings, followed = tmp_path / "recordings", tmp_path / "followed"
    recordings.mkdir()
    followed.mkdir()
    render(rules)
    port = free_port()
    serve = [sys.executable, "-m", "gradwatch", "serve", str(followed), "--port", str(port)]
    seen = Seen()
    with ExitStack() as stack:
        monitoring = stack.enter_context(chain(tmp_path, rules))
        agent = [{"targets": [f"127.0.0.1:{port}"]}]
        (monitoring.targets / "agent.json").write_text(json.dumps(agent))
        stack.enter_context(running(serve, tmp_path / "serve.log"))
        provoke = [sys.executable, SCRIPT, go, monitoring.targets, recordings, followed]
        stack.enter_context(running(list(map(str, provoke)), log))
        wait_for_good_health(monitoring, wait_for, log)
        go.touch()
        deadline = time.monotonic() + MOST_SECONDS
        while not seen.all_of_it and time.monotonic() < deadline:
            time.sleep(0.5)
            seen.look(monitoring)
        seen.faults = {path.stem: float(path.read_text()) for path in tmp_path.glob("*.fault")}
        (steps,) = monitoring.value(f'gradwatch_steps_total{{run="{HEALTHY}"}}')
        seen.healthy_steps = float(steps["value"][1])
        print_table(seen)
        yield seen


def print_table(seen: Seen) -> None:
    print(f"\n{'alert':<30} {'run':<20} from the fault to firing")
    for alert in PROVOKED:
        passed = seen.fired.get(key_of(alert), float("nan")) - seen.faults.get(
            run_of(alert), float("nan")
        )
        print(f"{alert:<30} {run_of(alert):<20} {passed:>8.1f} s")


def test_each_alert_is_provoked_or_it_is_said_why_it_cannot_be():
    assert sorted([*PROVOKED, *CANNOT_BE_PROVOKED]) == sorted(SEVERITY_OF)


def test_each_fault_fires_its_alert_and_a_healthy_run_beside_them_has_none(seen):
    """One test, since a worker for each would start all of this again."""
    never = float("-inf")
    silent = [
        alert for alert in PROVOKED
        if seen.fired.get(key_of(alert), never) < seen.faults[run_of(alert)]
    ]  # fmt: skip
    assert not silent
    assert sorted(seen.paged) == CRITICAL
    assert seen.healthy_steps > 100  # else it had nothing to be judged by
    found = {alert for alert, run in {*seen.fired, *seen.pending} if run == HEALTHY}
    assert not found - OF_THE_MACHINE

    texts = [(key, text) for key, some in seen.annotations.items() for text in some]
    assert not [one for one in texts if "error expanding" in one[1]]
    own = {key: seen.annotations[key] for key in map(key_of, PROVOKED)}
    assert all(len(some) >= 3 for some in own.values())  # summary, description, link
    assert not [(key, text) for key in own for text in own[key] if "unknown" in text]
