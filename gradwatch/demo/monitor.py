"""A running watch in, what the views show of it out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from gradwatch.records import Anomaly, Float32s, StepRecord
from gradwatch.watch import Watch

__all__ = ["RECENT", "LayerNow", "Monitor"]

RECENT = 100
"""Steps that shares and usual norms are taken of."""

AT_ONCE = 256
"""What `watch.history` keeps."""


@dataclass(frozen=True, slots=True)
class LayerNow:
    """One layer's norm beside its usual one, the median of the recent calm steps."""

    layer: str
    norm: float
    usual: float

    @property
    def ratio(self) -> float:
        return self.norm / self.usual if self.usual else 1.0


class Monitor:
    """Follows one run: `update` from the loop, anomalies from gradwatch's own thread."""

    def __init__(self, watch: Watch, num_steps: int) -> None:
        self.watch = watch
        self.num_steps = num_steps
        self.total_norms: list[float] = []
        """Pre-clip, one for each step so far."""

        self.recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._calm_norms: deque[Float32s] = deque(maxlen=RECENT)
        """[L] of the recent steps outside of episodes: what is usual."""

        self.anomalies: list[Anomaly] = []
        watch.on_anomaly(self.anomalies.append)

    @property
    def done(self) -> int:
        return len(self.total_norms)

    @property
    def latest(self) -> StepRecord | None:
        return self.recent[-1] if self.recent else None

    def update(self, done: int) -> None:
        """Takes over the records below step `done`."""
        calm = not self.open_kinds()
        for record in self.watch.history(min(done - self.done, AT_ONCE)):
            self.total_norms.append(record.total_norm)
            self.recent.append(record)
            if calm and np.isfinite(record.total_norm):
                self._calm_norms.append(record.grad_norms)

    def share_clipped(self) -> float:
        """Of the recent steps, 0 to 1."""
        return sum(record.clipped for record in self.recent) / max(len(self.recent), 1)

    def num_skipped(self) -> int:
        """Among the recent steps."""
        return sum(record.skipped is not None for record in self.recent)

    def open_kinds(self) -> dict[str, tuple[str, ...]]:
        """Kinds of anomaly that are going on, each with its layers."""
        return self.watch.pipeline.consumer.open_anomalies()

    def worst_layers(self, count: int) -> list[LayerNow]:
        """The layers that are furthest above their usual norm, in the order of the model."""
        latest = self.latest
        if latest is None or not self._calm_norms:
            return []
        usual_L = np.median(self._calm_norms, axis=0)
        layers = [
            LayerNow(layer, float(norm), float(usual))
            for layer, norm, usual in zip(latest.layers, latest.grad_norms, usual_L, strict=True)
        ]
        worst = sorted(layers, key=_rank)[:count]
        return [layer for layer in layers if layer in worst]


def _rank(layer: LayerNow) -> float:
    return -layer.ratio if np.isfinite(layer.norm) else -np.inf
