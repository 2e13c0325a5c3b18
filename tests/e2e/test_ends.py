"""A process that dies 50 ms after an explosion is noticed all the same, with the real programs.

scraped   it lingers -> Prometheus, the rule -> Alertmanager -> pager
pushed    its summary -> Pushgateway -> Prometheus, the rule -> Alertmanager -> pager
posted    the alert itself -> Alertmanager -> pager
read      its recording -> gradwatch serve -> Prometheus, the rule -> Alertmanager -> pager
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.servers, pytest.mark.slow]

ALERTS = {
    "nonfinite": "GradwatchNonFiniteGradient",
    "exploding": "GradwatchExplodingGradient",
}
IN_ORDER = ("exception", "sys.exit", "SIGTERM")
ABRUPT = ("SIGKILL", "os._exit")
CODES = {"exception": 1, "sys.exit": 3, "SIGTERM": -15, "SIGKILL": -9, "os._exit": 7}
TIMES = 4


@pytest.fixture(scope="module")
def monitoring(chain, tmp_path_factory) -> Iterator:
    with chain(tmp_path_factory.mktemp("monitoring")) as monitoring:
        yield monitoring


@pytest.fixture
def die(tmp_path, monitoring, running, wait_for):
    """Has runs explode and die in each way, four times; the runs by name with their faults."""

    def die(path: str, ways: tuple[str, ...], scraped: str = "", **attach: object) -> dict:
        specs = [
            {"run": f"{path}-{way}-{i}", "way": way, "fault": fault, "attach": {
                "port": None, "recording": None, **attach}}
            for way in ways for i, fault in enumerate(("nonfinite", "exploding") * (TIMES // 2))
        ]  # fmt: skip
        go = tmp_path / "go"
        script = Path(__file__).with_name("dying.py")
        log = tmp_path / "dying.log"
        with running([sys.executable, script, go, json.dumps(specs)], log) as trainers:
            if scraped:
                wait_for(
                    "the first scrape of each", 90,
                    lambda: len(monitoring.value(scraped)) == len(specs),
                )  # fmt: skip
            go.touch()
            trainers.wait(120)
        ended = dict(line.split()[1:] for line in log.read_text().splitlines() if "ended" in line)
        assert ended == {spec["run"]: str(CODES[spec["way"]]) for spec in specs}, log.read_text()
        return {spec["run"]: spec["fault"] for spec in specs}

    return die


@pytest.fixture
def noticed(monitoring, wait_for):
    """Waits for a page of each run; says for each way how many have come."""

    def noticed(runs: dict[str, str]) -> Counter:
        def paged() -> list[str]:
            return [
                run for run, fault in runs.items() if monitoring.pager.firing(ALERTS[fault], run)
            ]

        deadline = time.monotonic() + 30
        while len(paged()) < len(runs) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = Counter({run.rsplit("-", 1)[0]: 0 for run in runs})
        found.update(run.rsplit("-", 1)[0] for run in paged())
        if missed := set(runs) - set(paged()):
            print(f"\nmissed: {sorted(missed)}", end="")
        for way, count in found.items():
            print(f"\n{way}: noticed {count} of {TIMES}", end="")
        return found

    return noticed


def all_of(path: str, ways: tuple[str, ...]) -> dict[str, int]:
    return {f"{path}-{way}": TIMES for way in ways}


def test_a_run_that_is_scraped_lingers_until_it_was_scraped_once_more(monitoring, die, noticed):
    up = 'gradwatch_steps_total{run=~"scraped-.*"} > 0'
    runs = die("scraped", IN_ORDER, up, port=0, discovery=str(monitoring.targets))
    assert noticed(runs) == all_of("scraped", IN_ORDER)


def test_a_run_that_nobody_scrapes_leaves_what_happened_at_the_pushgateway(
    monitoring, die, noticed
):
    runs = die("pushed", IN_ORDER, pushgateway=monitoring.pushgateway)
    assert noticed(runs) == all_of("pushed", IN_ORDER)


@pytest.mark.parametrize("ways", [IN_ORDER, ABRUPT], ids=["in order", "abruptly"])
def test_an_alert_is_posted_before_the_process_is_gone(monitoring, die, noticed, ways):
    runs = die("posted", ways, alertmanager=monitoring.alertmanager)
    assert noticed(runs) == all_of("posted", ways)


def test_the_node_agent_finds_what_a_killed_run_left_in_its_recording(
    monitoring, die, noticed, running, free_port, tmp_path
):
    port, recordings = free_port(), tmp_path / "runs"
    recordings.mkdir()
    target = [{"targets": [f"127.0.0.1:{port}"]}]
    (monitoring.targets / "agent.json").write_text(json.dumps(target))
    serve = [sys.executable, "-m", "gradwatch", "serve", str(recordings), "--port", str(port)]
    with running(serve, tmp_path / "serve.log"):
        up = 'gradwatch_steps_total{run=~"read-.*"} > 0'
        runs = die("read", ABRUPT, up, recording=str(recordings))
        found = noticed(runs)
    (monitoring.targets / "agent.json").unlink()
    assert found == all_of("read", ABRUPT)


def test_what_is_posted_and_what_the_rule_finds_is_one_alert_and_one_page(
    monitoring, die, noticed, wait_for
):
    up = 'gradwatch_steps_total{run=~"both-.*"} > 0'
    runs = die(
        "both", ("exception",), up, port=0, discovery=str(monitoring.targets),
        alertmanager=monitoring.alertmanager,
    )  # fmt: skip
    assert noticed(runs) == all_of("both", ("exception",))
    firing = 'ALERTS{alertstate="firing",run=~"both-.*",alertname=~"Gradwatch(Expl|NonF).*"}'
    wait_for("the rule", 30, lambda: len(monitoring.value(firing)) == len(runs))
    time.sleep(5)  # for Prometheus to send them, and for a second page to come
    held = [alert for alert in monitoring.alerts() if alert["labels"]["run"] in runs]
    held = [alert for alert in held if alert["labels"]["alertname"] in ALERTS.values()]
    assert Counter(alert["labels"]["run"] for alert in held) == dict.fromkeys(runs, 1)
    from_rules = [alert for alert in held if "/graph?" in alert.get("generatorURL", "")]
    print(f"\nalerts held: {len(held)}, last told of by the rule: {len(from_rules)}")
    assert len({alert["fingerprint"] for alert in held}) == len(runs) == len(from_rules)
    for run, fault in runs.items():
        assert len(monitoring.pager.firing(ALERTS[fault], run)) == 1


def labels_of(labels: dict[str, str]) -> str:
    return ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items())


def in_promtool(sample, now: float) -> float:
    """Its clock begins at 0; what has happened by now was some minutes after that."""
    is_time = "timestamp" in sample.name and sample.value > 0
    return sample.value - now + 600 if is_time else sample.value


def test_what_was_pushed_alarms_nobody_an_hour_later(tmp_path, monitoring):
    """By every rule there is, over what the runs of this file have left at the Pushgateway."""
    with urllib.request.urlopen(f"{monitoring.pushgateway}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("gradwatch_")
    ]
    samples = [sample for sample in samples if not math.isnan(sample.value)]
    crashed = [sample for sample in samples if sample.labels.get("state") == "crashed"]
    assert sum(sample.value for sample in crashed) >= TIMES  # else this is about nothing
    rules = ROOT / "dashboards/rules/gradwatch.rules.yml"
    names = re.findall(r"alert: (\w+)", rules.read_text())
    now = time.time()
    series = [
        {
            "series": f"{sample.name}{{{labels_of(sample.labels)}}}",
            "values": f"{in_promtool(sample, now)}x120",
        }
        for sample in samples
    ]
    checks = [{"eval_time": "90m", "alertname": name, "exp_alerts": []} for name in names]
    tests = [{"interval": "1m", "input_series": series, "alert_rule_test": checks}]
    file = tmp_path / "pushed.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
