"""Layouts, rows and records without any framework."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from gradwatch.recording.ring import Row
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord


@pytest.fixture
def info() -> RunInfo:
    parameters = [
        Parameter(name="embed.weight", shape=(20, 4), module="Embedding", aliases=("head.weight",)),
        Parameter(name="höhe.weight", shape=(4, 4), module="Linear", group=1),
        Parameter(name="höhe.bias", shape=(4,), module="Linear", group=1),
    ]
    return RunInfo(
        run="run \N{SNOWMAN} one",
        layout=Layout.of(parameters),
        rules=("global", "tall"),
        mode="enforce",
        policy="version: 1\n",
        policy_sha256="ab" * 32,
        framework="torch 2.13.0",
        model="Net",
        version="0.1.0",
        started=time.time(),
        pid=123,
    )


@pytest.fixture
def row() -> Callable[..., Row]:
    def make(step: int, **changed) -> Row:
        values = {
            "step": step,
            "time": 1e9 + step,
            "duration_seconds": 0.5,
            "overhead_seconds": 1e-4,
            "total_norm": step + 0.5,
            "total_norm_clipped": 0.25,
            "clip_coef": 0.5,
            "fired": 0b10,
            "skipped": 0,
            "micro_batches": 2,
            "weight": 16.0,
            "loss_scale": float("nan"),
            "learning_rate": 0.1,
            "limits": [1.0, 2.0],
            "tensor_norms_P": np.array([step, 2, 3], dtype=np.float32),
            "tensor_coefs_P": None,
            "present_P": None,
        }
        return Row(**(values | changed))

    return make


@pytest.fixture
def record(info) -> Callable[..., StepRecord]:
    def make(step: int, **changed) -> StepRecord:
        values = {
            "step": step,
            "time": 1e9 + step,
            "layout": info.layout,
            "total_norm": 3.5,
            "total_norm_clipped": 1.0,
            "tensor_norms_P": np.array([1, 2, step], dtype=np.float32),
            "tensor_coefs_P": np.ones(3, dtype=np.float32),
            "present_P": np.ones(3, dtype=np.bool_),
            "limits": {"global": 1.0, "tall": 9.0},
        }
        return StepRecord(**(values | changed))

    return make


@pytest.fixture
def anomaly() -> Callable[..., Anomaly]:
    def make(step: int, kind: str = "exploding") -> Anomaly:
        return Anomaly(
            kind=kind,
            level="alert",
            step=step,
            layer="höhe",
            layers=("höhe", "embed"),
            value=12.0,
            expected=float("nan"),
            message='layer höhe: "big"',
        )

    return make
