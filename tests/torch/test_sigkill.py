"""A killed trainer leaves a whole recording: every step it had finished, once, in order."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradwatch

TRAINER = """
import sys, torch, gradwatch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.attach(
    model, optimizer, {"version": 1, "clip": [{"limit": 1.0}]},
    run="killed", port=None, recording=sys.argv[1],
)
print("ready", flush=True)
for step in range(1_000_000):
    loss = model(torch.randn(4, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    watch.log(loss=loss)
    optimizer.step()
    print(step, flush=True)
"""

FIRST_KILLS, ALL_KILLS = range(5), range(5, 50)


def killed_at(seconds: float, directory: Path) -> int:
    """Trains for so long, kills, and returns the last step that was reported done."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    time.sleep(seconds)
    trainer.kill()
    reported = trainer.stdout.read().splitlines()
    trainer.wait()
    trainer.stdout.close()
    # The last line may be cut short: what counts is a whole line.
    return int(reported[-1]) if reported else -1


def assert_whole(directory: Path, last: int) -> None:
    with gradwatch.open_recording(directory) as recording:
        records = list(recording.records())
    steps = [record.step for record in records]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= last if last >= 0 else True
    for record in records:
        assert record.total_norm > 0
        squares = float((record.tensor_norms_P**2).sum())
        assert record.total_norm**2 == pytest.approx(squares, rel=1e-5)
        assert "loss" in record.scalars


@pytest.mark.parametrize("attempt", FIRST_KILLS)
def test_after_sigkill_every_finished_step_is_in_the_recording(tmp_path, attempt):
    last = killed_at(random.Random(attempt).uniform(0, 0.6), tmp_path)
    assert_whole(tmp_path, last)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", ALL_KILLS)
def test_after_sigkill_at_45_further_moments_too(tmp_path, attempt):
    last = killed_at(random.Random(attempt).uniform(0, 1.5), tmp_path)
    assert_whole(tmp_path, last)
