"""A snapshot in, every series out: METRICS joined with what is known by now.

The renderer and the collector both show what comes from here, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gradwatch.export.metrics import METRICS, MetricSpec
from gradwatch.records import RunInfo
from gradwatch.tally import Histogram, Labels, Snapshot

__all__ = ["MOST_EXTRA_LAYERS", "MOST_LAYERS", "Family", "HistogramFamily", "Series", "clean"]

PER_LAYER = {
    "grad_norm": "grad_norms",
    "clip_coef": "coefs",
    "update_ratio": "update_ratios",
}
"""Metrics with a value for each layer, and what they are called in a snapshot."""

MOST_LAYERS = 512
"""Layers that have series of their own, the first ones of the layout: a stable choice."""

MOST_EXTRA_LAYERS = 64
"""Further layers that have them while they are in an open episode, worst first."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric's samples; `labels` come beside `run` and `rank`."""

    spec: MetricSpec
    labels: tuple[Labels, ...]
    values: list[float]


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """One metric's one histogram."""

    spec: MetricSpec
    histogram: Histogram


class Series:
    """Turns the snapshots of one run into families."""

    def __init__(self, info: RunInfo, *, max_layers: int = MOST_LAYERS) -> None:
        """Per-layer series come from rank 0 only."""
        names = info.layout.layers if info.rank == 0 else ()
        self.run_and_rank = (clean(info.run), str(info.rank))
        self._layer_labels = tuple((clean(name),) for name in names)
        self._index = {name: index for index, name in enumerate(names)}
        self._most = max_layers
        self._first = self._layer_labels[:max_layers]

    def families(self, snapshot: Snapshot) -> Iterator[Family | HistogramFamily]:
        """In the order of METRICS; a metric without a sample yet is left out."""
        extra = self._extra(snapshot.active)
        labels = self._first + tuple(self._layer_labels[index] for index in extra)
        for name, spec in METRICS.items():
            if name in snapshot.histograms:
                yield HistogramFamily(spec, snapshot.histograms[name])
            elif name in snapshot.numbers:
                yield Family(spec, ((),), [snapshot.numbers[name]])
            elif values := snapshot.labelled.get(name):
                yield Family(spec, _cleaned(values), list(values.values()))
            elif name == "info":
                yield Family(spec, (_info_labels(snapshot.info),), [1])
            elif name == "series_dropped":
                yield Family(spec, ((),), [len(self._layer_labels) - len(labels)])
            elif name in PER_LAYER:
                values_L = getattr(snapshot, PER_LAYER[name])
                if labels and values_L.size:
                    yield Family(spec, labels, _chosen(values_L.tolist(), self._most, extra))

    def _extra(self, active: Mapping[str, tuple[str, ...]]) -> tuple[int, ...]:
        """Layers over the cap in an open episode, in the order of the layout."""
        if len(self._layer_labels) <= self._most:
            return ()
        worst = {self._index.get(layer, 0): None for layers in active.values() for layer in layers}
        beyond = [index for index in worst if index >= self._most]
        return tuple(sorted(beyond[:MOST_EXTRA_LAYERS]))


def clean(text: str) -> str:
    """A name from outside as a label value: UTF-8 can hold it, and a scraper can read it."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _chosen(values_L: list[float], most: int, extra: tuple[int, ...]) -> list[float]:
    return values_L[:most] + [values_L[index] for index in extra]


def _cleaned(values: Mapping[Labels, float]) -> tuple[Labels, ...]:
    return tuple(tuple(clean(value) for value in labels) for labels in values)


def _info_labels(info: RunInfo) -> Labels:
    """The policy goes by the first digits of its hash, as it does in logs."""
    values = {
        "version": info.version,
        "framework": info.framework,
        "mode": info.mode,
        "policy": info.policy_sha256[:12],
        "model": info.model,
    }
    return tuple(clean(values[label]) for label in METRICS["info"].labels)
