"""The examples with Keras as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradwatch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "micro_batches"), [("keras_cnn", 2), ("keras_lstm", 4)])
def test_an_example_trains_and_is_recorded(name, micro_batches, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / f"examples/{name}.py"), "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Watch(" in done.stdout
    with gradwatch.open_recording(tmp_path / "gradwatch-runs") as recording:
        records = list(recording)
        assert recording.state == "finished"
    assert len(records) == 60
    assert {record.micro_batches for record in records} == {micro_batches}
    assert any("value" in record.fired for record in records)
    assert any("norm" in record.fired for record in records)
    norms = np.array([record.total_norm_clipped for record in records])
    assert (norms <= (0.5 if name == "keras_cnn" else 0.25) * (1 + 1e-6)).all()
    if name == "keras_lstm":
        losses = [record.scalars["loss"] for record in records]
        assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
