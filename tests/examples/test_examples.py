"""The examples as a user runs them: they train, and what they show is what happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch

ROOT = Path(__file__).parents[2]
STEPS = {"cnn": 150, "lstm": 80, "gpt": 40, "finetune": 150, "mixed_precision": 120}


def run_example(name: str, steps: int, tmp_path: Path) -> str:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", f"examples/{name}.py", str(steps)],
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
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_an_example_trains_and_is_recorded(name, tmp_path):
    run_example(name, STEPS[name], tmp_path)
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
    if name == "finetune":
        early, late = records[0].limits, records[-1].limits
        assert (early["head"], late["head"]) == (0.2, 1.0)
        assert not any(layer.startswith("stem") for layer in recording.layers)
        assert 0 < sum("block" in record.fired for record in records) < len(records)
    if name == "mixed_precision":
        dropped = sum(record.skipped == "overflow" for record in records)
        assert 1 <= dropped < 20
        taken = [record for record in records if record.skipped is None]
        assert records[-1].learning_rate == pytest.approx(  # the schedule has waited
            1e-3 * (1 + np.cos(np.pi * (len(taken) - 1) / STEPS[name])), rel=1e-6
        )


@pytest.mark.slow
def test_both_networks_of_a_gan_are_watched(tmp_path):
    run_example("gan", 150, tmp_path)
    for network in ("generator", "discriminator"):
        (path,) = (tmp_path / "gradwatch-runs").glob(f"gan-{network}-*.sqlite")
        with gradwatch.open_recording(path) as recording:
            records = list(recording)
        assert len(records) == 150
        assert all(record.total_norm_clipped <= 10 * 1.001 for record in records[50:])
        assert len({record.limits["level"] for record in records[50:]}) > 50
    losses = [record.scalars["loss"] for record in records]
    assert min(losses) < 0.8 * losses[0]
    assert any("agc" in record.fired for record in records)


def test_the_policy_in_the_readme_is_the_one_of_the_examples_and_the_demo():
    policy = (ROOT / "examples/policy.yaml").read_text()
    assert policy in (ROOT / "README.md").read_text()
    assert policy == (ROOT / "gradwatch/demo/policy.yaml").read_text()


@pytest.mark.slow
def test_a_healthy_checkpoint_is_not_overwritten_by_a_bad_one(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "examples/checkpoints.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "exploding: checkpoints/healthy.pt stays as it is" in done.stdout
    healthy, latest = (
        torch.load(tmp_path / "checkpoints" / f"{name}.pt", weights_only=True)
        for name in ("healthy", "latest")
    )
    assert healthy["step"] < 300 < latest["step"]
    assert all(torch.isfinite(weight).all() for weight in healthy["model"].values())
