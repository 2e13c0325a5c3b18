"""`GradWatch` in the callbacks of a fit, and the whole way to a recording and /metrics."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import keras
import pytest

import gradwatch
from gradwatch.errors import TrainingStopped
from gradwatch.keras import GradWatch
from tests.tensorflow.conftest import STEPS, compiled, difference, examples, fit, weights

POLICY = {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]}


def adam(**clip: float) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(1e-2, **clip)


def test_a_callback_watches_a_fit_from_begin_to_end(tmp_path):
    theirs = compiled(lambda: adam(global_clipnorm=1.0))
    fit(theirs)
    ours = compiled(adam)
    x, y = examples()
    callback = GradWatch(POLICY, run="fitted", port=None, recording=tmp_path)
    ours.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
    assert difference(weights(ours), weights(theirs)) <= 1e-7
    with gradwatch.open_recording(tmp_path) as recording:
        assert recording.state == "finished"
        assert recording.info.run == "fitted"
        assert recording.info.framework.startswith("tensorflow")
        records = list(recording)
    assert [record.step for record in records] == list(range(STEPS))
    assert all("loss" in record.scalars for record in records)
    fit(ours)  # watched no longer
    assert callback.watch.latest.step == STEPS - 1


def test_a_second_fit_goes_on_with_the_state_of_the_first(tmp_path):
    x, y = examples()
    policy = {"version": 1, "clip": [{"limit": {"z": 2, "warmup": 5, "until": 1.0}}]}
    first = GradWatch(policy, port=None, recording=None)
    compiled(adam).fit(x, y, batch_size=8, verbose=0, callbacks=[first])
    second = GradWatch(policy, port=None, recording=None)
    second.load_state_dict(first.state_dict())
    compiled(adam).fit(x, y, batch_size=8, verbose=0, callbacks=[second])
    assert second.watch.latest.step == 2 * STEPS - 1


def test_a_fit_that_the_policy_stops_is_recorded_as_stopped(tmp_path):
    x, y = examples()
    x[100] = math.nan
    policy = {"version": 1, "guard": {"nonfinite": "stop"}}
    with pytest.raises(TrainingStopped):
        with GradWatch(policy, port=None, recording=tmp_path) as callback:
            compiled(adam).fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
    with gradwatch.open_recording(tmp_path) as recording:
        assert recording.state == "stopped"
        assert [record.skipped for record in recording][-1] == "nonfinite"
        assert len(recording) == 13


def test_metrics_are_served_while_it_trains(tmp_path):
    class Scrape(keras.callbacks.Callback):
        text = ""

        def on_epoch_end(self, epoch, logs=None):
            watch.watch.flush()
            with urllib.request.urlopen(watch.watch.url, timeout=5) as answer:
                self.text = answer.read().decode()

    watch, scrape = GradWatch(POLICY, port=0, recording=None, linger=0), Scrape()
    x, y = examples()
    compiled(adam).fit(x, y, batch_size=8, verbose=0, callbacks=[watch, scrape])
    lines = dict(line.rsplit(" ", 1) for line in scrape.text.splitlines() if line[0] != "#")
    by_name = {name.partition("{")[0]: float(value) for name, value in lines.items()}
    assert by_name["gradwatch_steps_total"] == STEPS
    assert by_name["gradwatch_clipped_steps_total"] == STEPS
    assert by_name["gradwatch_total_norm_clipped"] == pytest.approx(1.0, rel=1e-5)
    assert by_name["gradwatch_learning_rate"] == pytest.approx(1e-2)
    assert 'layer="' in scrape.text


ON_TORCH = Path(__file__).with_name("on_torch.py")


def test_keras_on_torch_goes_to_the_torch_side():
    done = subprocess.run(
        [sys.executable, str(ON_TORCH)],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
