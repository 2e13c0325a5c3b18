"""The same series for a registry of your own: what prometheus_client calls a collector.

from prometheus_client import REGISTRY
REGISTRY.register(TallyCollector(watch.pipeline.tally))
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from gradwatch.export.metrics import METRICS, MetricSpec
from gradwatch.export.series import MOST_LAYERS, Family, HistogramFamily, Series
from gradwatch.tally import Histogram, Labels, Tally

__all__ = ["TallyCollector"]

COMMON = ("run", "rank")


class TallyCollector(Collector):
    """Yields what `/metrics` of the endpoint shows, as of the moment that it is asked."""

    def __init__(self, tally: Tally, *, max_layers: int = MOST_LAYERS) -> None:
        self._tally = tally
        self._series = Series(tally.info, max_layers=max_layers)

    def describe(self) -> Iterable[Metric]:
        """Names alone, so that registering asks for nothing."""
        return [_empty(spec) for spec in METRICS.values()]

    def collect(self) -> Iterable[Metric]:
        for family in self._series.families(self._tally.snapshot()):
            yield self._filled(family)

    def _filled(self, family: Family | HistogramFamily) -> Metric:
        metric = _empty(family.spec)
        common = self._series.run_and_rank
        if isinstance(family, HistogramFamily):
            assert isinstance(metric, HistogramMetricFamily)
            metric.add_metric(common, _buckets(family.histogram), family.histogram.sum)
            return metric
        for labels, value in zip(family.labels, family.values, strict=True):
            _add(metric, family.spec, (*common, *labels), value)
        return metric


def _empty(spec: MetricSpec) -> Metric:
    labels = (*COMMON, *spec.labels)
    match spec.type:
        case "counter":
            return CounterMetricFamily(spec.family, spec.help, labels=labels)
        case "gauge":
            return GaugeMetricFamily(spec.family, spec.help, labels=labels)
        case "histogram":
            return HistogramMetricFamily(spec.family, spec.help, labels=labels)
        case "info":
            return InfoMetricFamily(spec.family, spec.help, labels=labels)


def _add(metric: Metric, spec: MetricSpec, labels: Labels, value: float) -> None:
    if isinstance(metric, InfoMetricFamily):
        metric.add_metric(labels, {})
        return
    assert isinstance(metric, (CounterMetricFamily, GaugeMetricFamily))
    metric.add_metric(labels, value)


def _buckets(histogram: Histogram) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    totals = accumulate(histogram.counts)
    return [
        (bound, total)
        if exemplar is None
        else (bound, total, Exemplar({"step": str(exemplar.step)}, exemplar.value, exemplar.time))
        for bound, total, exemplar in zip(bounds, totals, histogram.exemplars, strict=True)
    ]
