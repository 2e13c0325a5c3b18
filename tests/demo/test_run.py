"""The demo end to end: what is broken is found, named and told, and nothing else."""

from __future__ import annotations

import math
import signal
import subprocess
from urllib.request import urlopen

import pytest

STEPS = 240
FAULT_STEP = STEPS // 2

pytestmark = pytest.mark.slow


def arguments(fault: str, *more: str) -> tuple[str, ...]:
    return ("--fault", fault, "--steps", str(STEPS), *more)


def test_a_healthy_run_raises_no_alert(demo):
    run = demo(*arguments("none"))
    assert run.code == 0, run.out + run.err
    assert "raised no alert in 240 steps" in run.out
    assert [a for a in run.recording.anomalies() if a.level != "event"] == []


def test_a_learning_rate_x100_is_found_as_an_explosion_within_ten_steps(demo):
    run = demo(*arguments("lr"))
    assert run.code == 0, run.out + run.err
    alerts = [a for a in run.recording.anomalies() if a.level == "alert"]
    assert alerts[0].kind == "exploding"
    assert 0 < alerts[0].step - FAULT_STEP <= 10
    delay = alerts[0].step - FAULT_STEP
    said = f"step {alerts[0].step}  gradwatch, {delay} steps later: ALERT {alerts[0].message}"
    assert said in run.out


def test_the_explosion_was_clipped_to_the_limit_of_the_policy(demo):
    records = list(demo(*arguments("lr")).recording.records())
    exploded = [record for record in records if record.total_norm > 10]
    assert exploded
    for record in exploded:
        assert record.clipped
        assert record.total_norm_clipped == pytest.approx(1.0, rel=1e-5)


def test_the_layers_are_told_in_the_order_in_which_they_moved(demo):
    lines = demo(*arguments("lr")).out.partition("Which layer moved first")[2].splitlines()[2:]
    table = [line.split() for line in lines if line.endswith("x)")]
    steps = [int(row[1]) for row in table]
    assert steps
    assert steps == sorted(steps)
    assert steps[0] > FAULT_STEP


def test_one_nan_skips_one_step_and_the_run_goes_on(demo):
    run = demo(*arguments("nan"))
    assert run.code == 0, run.out + run.err
    assert "skipped 1 step (nonfinite)" in run.out
    records = list(run.recording.records())
    assert [record.step for record in records if record.skipped] == [FAULT_STEP]
    assert math.isnan(records[FAULT_STEP].total_norm)
    found = [(a.kind, a.step) for a in run.recording.anomalies() if a.level == "alert"]
    assert found == [("nonfinite", FAULT_STEP)]


@pytest.mark.parametrize(("fault", "kind"), [("loss", "exploding"), ("dead", "vanishing")])
def test_the_other_faults_are_found_too(demo, fault, kind):
    run = demo(*arguments(fault))
    assert run.code == 0, run.out + run.err
    alerts = [a for a in run.recording.anomalies() if a.level != "event"]
    assert alerts[0].kind == kind
    assert alerts[0].step >= FAULT_STEP


def test_the_gpt_runs_and_explodes_as_well(demo):
    run = demo(*arguments("lr", "--model", "gpt"))
    assert run.code == 0, run.out + run.err
    assert "ALERT exploding" in run.out


@pytest.mark.parametrize("fault", ["none", "lr", "nan"])
def test_the_recording_that_it_names_has_every_step(demo, fault):
    recording = demo(*arguments(fault)).recording
    assert [record.step for record in recording.records()] == list(range(STEPS))
    assert all("loss" in record.scalars for record in recording.records())


def test_the_commands_that_it_names_work_as_they_are_pasted(demo):
    run = demo(*arguments("lr"))
    assert len(run.commands) == 5
    for command in run.commands:
        if " serve " in command:
            continue  # goes on until it is told to stop: the next test
        done = subprocess.run(
            command, shell=True, cwd=run.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert "exploding" in done.stdout
    assert len((run.folder / "steps.csv").read_text().splitlines()) == STEPS + 1


def test_the_page_that_it_names_has_the_run(demo):
    run = demo(*arguments("lr"))
    (command,) = [command for command in run.commands if " serve " in command]
    with subprocess.Popen(
        f"exec {command} --port 0", shell=True, cwd=run.folder, stdout=subprocess.PIPE, text=True
    ) as served:
        try:
            said = [served.stdout.readline(), served.stdout.readline()]
            assert said[1].startswith("the page is at http://127.0.0.1:")
            with urlopen(said[1].split()[-1], timeout=60) as page:
                assert "demo-digits" in page.read().decode()
        finally:
            served.send_signal(signal.SIGINT)
            assert served.wait(60) == 0


def test_a_policy_without_the_detector_is_a_demo_that_failed(demo, tmp_path):
    policy = tmp_path / "blind.yaml"
    policy.write_text("version: 1\nclip: [{limit: 1.0}]\ndetect: {exploding: none}\n")
    run = demo(*arguments("lr", "--policy", str(policy)))
    assert run.code == 1, run.out + run.err
    assert "expected an alert 'exploding' after the fault" in run.out


def test_a_policy_that_stops_the_run_is_told_with_its_reason(demo, tmp_path):
    policy = tmp_path / "stop.yaml"
    policy.write_text("version: 1\nguard: {nonfinite: stop}\n")
    run = demo(*arguments("nan", "--policy", str(policy)))
    assert run.code == 0, run.out + run.err
    assert f"stopped before the update of step {FAULT_STEP}" in run.out


def test_nothing_but_the_result_of_the_run_is_printed(demo):
    run = demo(*arguments("none"))
    assert run.err == ""
    assert "\x1b" not in run.out
