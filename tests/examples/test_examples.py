"""The examples as a user runs them: they train, and what they show is what happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradwatch

ROOT = Path(__file__).parents[2]
STEPS = {"cnn": 150, "lstm": 80, "gpt": 40}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_an_example_trains_and_is_recorded(name, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", f"examples/{name}.py", str(STEPS[name])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Watch(")
    assert "Error" not in done.stderr
    with gradwatch.open_recording(tmp_path / "gradwatch-runs") as recording:
        assert len(recording) == STEPS[name]
        assert recording.state == "finished"
        records = list(recording)
    losses = np.array([record.scalars["loss"] for record in records])
    assert losses[-10:].mean() < losses[:10].mean() * 0.8
    assert any(record.clipped for record in records)
    assert all(np.isfinite(record.total_norm) for record in records if record.skipped is None)
    if name == "gpt":
        assert {record.micro_batches for record in records} == {4}
        assert len({record.weight for record in records}) > STEPS[name] / 2
    if name == "lstm":
        assert records[0].loss_scale == 2.0**16


def test_the_policy_in_the_readme_is_the_one_of_the_examples_and_the_demo():
    policy = (ROOT / "examples/policy.yaml").read_text()
    assert policy in (ROOT / "README.md").read_text()
    assert policy == (ROOT / "gradwatch/demo/policy.yaml").read_text()
