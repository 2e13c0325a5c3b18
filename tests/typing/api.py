"""A user's file, type-checked as one: the public names and what they give."""

from __future__ import annotations

from pathlib import Path

import torch

import gradwatch
import gradwatch.keras
import gradwatch.lightning
import gradwatch.transformers


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    policy = {"version": 1, "clip": [{"limit": 1.0}]}
    with gradwatch.attach(model, optimizer, policy, run="typed", port=None) as watch:
        watch.on_anomaly(page)
        watch.log(loss=torch.tensor(0.5), accuracy=0.9)
        optimizer.step()
        if watch.skipped is not None:
            print(watch.skipped)
        record: gradwatch.StepRecord | None = watch.latest
        norms = [step.total_norm for step in watch.history(10)]
        path: Path | None = watch.recording
    if path is not None:
        with gradwatch.open_recording(path) as recording:
            norms += [step.total_norm for step in recording.records()]
    return record.total_norm if record else sum(norms)


def callbacks(scaler: object) -> list[gradwatch.Watch | None]:
    fitting = gradwatch.lightning.GradWatch("policy.yaml", run="typed", scaler=scaler)
    training = gradwatch.transformers.GradWatch({"version": 1}, port=None, recording=None)
    posting = gradwatch.keras.GradWatch(
        "policy.yaml", run="typed", linger=1.0, pushgateway="http://127.0.0.1:9091",
        alertmanager=["http://127.0.0.1:9093"], alert_labels={"job": "typed"},
    )  # fmt: skip
    with posting as compiled:
        state = compiled.state_dict()
        compiled.load_state_dict(state)
    watches: tuple[gradwatch.Watch, ...] = fitting.watches
    return [fitting.watch, training.watch, compiled.watch, *watches]


def page(anomaly: gradwatch.Anomaly) -> None:
    print(anomaly.kind, anomaly.level, anomaly.step, anomaly.layer, anomaly.message)
