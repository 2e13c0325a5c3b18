"""`gradwatch replay` and `gradwatch advise` as a shell runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gradwatch.policy import load_policy, parse_policy
from gradwatch.whatif.replay import replay
from tests.whatif.conftest import rough


@pytest.fixture
def cli(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "gradwatch", *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_replay_prints_a_table_and_a_picture(cli, recorded, tmp_path):
    recording = recorded({"version": 1, "clip": [{"limit": 0.5}]}, gains=rough)
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nclip:\n  - {limit: 0.3}\n  - {measure: l1, limit: 9, name: one}\n")
    done = cli("replay", recording.path, "--policy", path)
    assert (done.returncode, done.stderr) == (0, "")
    found = replay(recording.records(), recording.info, load_policy(path))
    assert f"clipped {found.clipped} of 160 steps" in done.stdout
    assert "another policy than the run's" in done.stdout
    assert "not recorded: l1" in done.stdout
    chart = done.stdout.splitlines()[-12:]
    assert any("─" in line for line in chart), "the limit is drawn"
    assert any("×" in line for line in chart), "the NaN is drawn"
    assert chart[-1].split() == ["step", "0", "159"]


def test_replay_of_the_policy_that_ran_says_that_nothing_differs(cli, recorded, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nclip:\n  - {limit: 0.5}\n")
    recording = recorded(load_policy(path))
    done = cli("replay", tmp_path, "-p", path)
    assert done.returncode == 0, done.stderr
    assert "Computed again, every step is decided as it was recorded." in done.stdout
    assert recording.info.run in done.stdout


def test_a_missing_recording_or_policy_is_one_line(cli, recorded, tmp_path):
    recording = recorded(None, steps=3)
    missing = cli("replay", recording.path, "-p", tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert len(missing.stderr.splitlines()) == 1
    assert cli("advise", tmp_path / "nowhere").returncode == 2


def test_advise_prints_lines_to_paste(cli, recorded):
    recording = recorded(None)
    done = cli("advise", recording.path)
    assert (done.returncode, done.stderr) == (0, "")
    pasted = "".join(
        line[4:] + "\n" for line in done.stdout.splitlines() if line.startswith("    ")
    )
    assert parse_policy("version: 1\n" + pasted).clip[0].name == "advised"
    assert "accumulation: not known" in done.stdout
