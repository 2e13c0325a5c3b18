"""Tallies of made-up runs, and a client that sees what a scraper sees."""

from __future__ import annotations

import http.client
import math
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import pytest

from gradwatch.records import SAMPLES, Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.rules.detection import KINDS
from gradwatch.tally import Tally


def info_of(layers: list[str] | int = 3, **fields: object) -> RunInfo:
    names = [f"block.{i}" for i in range(layers)] if isinstance(layers, int) else layers
    values: dict[str, object] = {
        "run": "test-run",
        "layout": Layout.of([Parameter(name=f"{name}.weight") for name in names]),
        "rules": ("global",),
        "multiplying": ("global",),
        "mode": "enforce",
        "version": "1.2.3",
        "framework": "torch 2.13.0",
        "model": "Net",
        "policy_sha256": "0123456789abcdef" * 4,
    }
    return RunInfo(**{**values, **fields})


def step_of(layout: Layout, step: int = 0, norms: object = None, **fields: object) -> StepRecord:
    count = len(layout.parameters)
    norms = np.asarray(np.arange(1, count + 1) if norms is None else norms, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        total = float(np.linalg.norm(norms.astype(np.float64)))
    values: dict[str, object] = {
        "step": step,
        "time": 1_700_000_000.0 + step,
        "layout": layout,
        "total_norm": total,
        "total_norm_clipped": total,
        "tensor_norms_P": norms,
        "tensor_coefs_P": np.ones(count, dtype=np.float32),
        "present_P": np.ones(count, dtype=np.bool_),
    }
    return StepRecord(**{**values, **fields})


def busy_tally(layers: list[str] | int = 3, **fields: object) -> Tally:
    """A tally with a value for every metric, not finite ones among them."""
    info = info_of(layers, **fields)
    tally = Tally(info, kinds=KINDS, clock=lambda: 1_700_000_002.0)
    layout = info.layout
    whole = {
        "limits": {"global": 1.0},
        "loss_scale": 65536.0,
        "learning_rate": 1e-3,
        "noise_scale": 12.0,
        "local_norm": 1.5,
        "scalars": {"loss": 0.25},
        "overhead_seconds": 1e-4,
        "duration_seconds": 0.02,
        "samples": {name: np.full(len(layout.parameters), 0.01, np.float32) for name in SAMPLES},
    }
    tally.add(step_of(layout, 0, **whole))
    clip = {"fired": ("global",), "clipped": True, "clip_coef": 0.5, "total_norm_clipped": 1.0}
    coefs = np.full(len(layout.parameters), 0.5, dtype=np.float32)
    tally.add(step_of(layout, 1, **whole, **clip, tensor_coefs_P=coefs))
    norms = np.arange(len(layout.parameters), dtype=np.float32)
    norms[:1] = math.nan
    anomaly = Anomaly(kind="nonfinite", level="alert", step=2, layer=layout.layers[0])
    tally.add(step_of(layout, 2, norms, **whole, skipped="nonfinite", anomalies=(anomaly,)))
    tally.set_active({"nonfinite": (layout.layers[0],)})
    tally.set_enforcing(True)
    tally.set_records_dropped(2)
    tally.set_recording_bytes(4096)
    tally.hook_error("callback")
    return tally


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def get(url: str, path: str | None = None, method: str = "GET", **headers: str) -> Answer:
    """Asks without following, unpacking or correcting anything."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path or parts.path, headers=named)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


@pytest.fixture(scope="session", name="info_of")
def info_of_fixture() -> Callable[..., RunInfo]:
    return info_of


@pytest.fixture(scope="session", name="step_of")
def step_of_fixture() -> Callable[..., StepRecord]:
    return step_of


@pytest.fixture(scope="session", name="busy_tally")
def busy_tally_fixture() -> Callable[..., Tally]:
    return busy_tally


@pytest.fixture(scope="session", name="get")
def get_fixture() -> Callable[..., Answer]:
    return get
