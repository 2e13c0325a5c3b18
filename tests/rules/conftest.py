"""Synthetic runs: a layout, log-normal norms, and records made of them.

The fixtures are plain functions; nothing is kept between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from gradwatch.records import Anomaly, Layout, Parameter, StepRecord
from gradwatch.rules.detection import Detection

Norms = npt.NDArray[np.floating]


def layers_named(names: Iterable[str]) -> Layout:
    """One layer of one tensor for each name."""
    return Layout.of([Parameter(name=f"{name}.weight") for name in names])


def layers(count: int) -> Layout:
    return layers_named(f"block.{i}" for i in range(count))


def healthy(
    steps: int, layers: int = 3, *, seed: int = 0, sigma: float = 0.2, median: float = 1.0
) -> Norms:
    """[T, L] log-normal norms."""
    draw = np.random.default_rng(seed)
    return median * np.exp(sigma * draw.standard_normal((steps, layers)))


def record(layout: Layout, step: int, norms: Norms | list[float], **fields: object) -> StepRecord:
    norms = np.asarray(norms, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        total = float(np.linalg.norm(norms.astype(np.float64)))
    values: dict[str, object] = {
        "step": step,
        "time": 0.0,
        "layout": layout,
        "total_norm": total,
        "total_norm_clipped": total,
        "tensor_norms_P": norms,
        "tensor_coefs_P": np.ones_like(norms),
        "present_P": np.ones(len(norms), dtype=np.bool_),
        "learning_rate": 1e-3,
    }
    return StepRecord(**{**values, **fields})


class Run:
    """One run under detection: norms in, anomalies out."""

    def __init__(self, layout: Layout, **config: object) -> None:
        self.layout = layout
        self.detection = Detection(layout, **config)
        self.step = 0
        self.seen: list[StepRecord] = []

    def play(self, norms_TL: Norms, **fields: object) -> list[Anomaly]:
        """Fields that are functions are called with the step."""
        return list(self.anomalies(norms_TL, **fields))

    def anomalies(self, norms_TL: Norms, **fields: object) -> Iterator[Anomaly]:
        for norms in norms_TL:
            now = {k: v(self.step) if callable(v) else v for k, v in fields.items()}
            self.seen.append(record(self.layout, self.step, norms, **now))
            self.step += 1
            yield from self.detection.observe(self.seen[-1])

    def warm(self, steps: int = 160, **fields: object) -> None:
        """Plays a healthy beginning, which must stay silent."""
        assert self.play(healthy(steps, len(self.layout.layers)), **fields) == []


@pytest.fixture(scope="session")
def run() -> Callable[..., Run]:
    """`run(3)` or `run(layout)`."""

    def make(of: int | Layout = 3, **config: object) -> Run:
        return Run(of if isinstance(of, Layout) else layers(of), **config)

    return make


@pytest.fixture(scope="session", name="healthy")
def healthy_fixture() -> Callable[..., Norms]:
    return healthy


@pytest.fixture(scope="session", name="layers_named")
def layers_named_fixture() -> Callable[[Iterable[str]], Layout]:
    return layers_named


@pytest.fixture(scope="session", name="record")
def record_fixture() -> Callable[..., StepRecord]:
    return record
