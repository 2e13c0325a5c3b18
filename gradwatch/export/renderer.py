"""A snapshot in, what a scraper reads out: the text format or OpenMetrics, as bytes.

Everything up to the value of a line is rendered once and kept, which makes 10,000 series some ten
times faster than prometheus_client. Between chunks the trainer gets the interpreter back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain

from prometheus_client.utils import floatToGoString

from gradwatch.export.metrics import AGENT_METRICS, METRICS, MetricSpec
from gradwatch.export.series import MOST_LAYERS, Family, HistogramFamily, Series
from gradwatch.records import RunInfo
from gradwatch.tally import Exemplar, Labels, Snapshot

__all__ = ["OPENMETRICS", "TEXT", "Lines", "Renderer", "agent_lines", "exposition"]

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

CHUNK = 250
"""Lines that are rendered at a stretch: about 0.1 ms."""

SPECIAL = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
Lines = Mapping[str, Sequence[str]]
"""Samples as text, by metric."""

ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class Renderer:
    """Renders the snapshots of one run; used by one thread at a time."""

    def __init__(
        self,
        info: RunInfo,
        *,
        max_layers: int = MOST_LAYERS,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            max_layers: how many layers have series of their own.
            pause: called between chunks; lets another thread run.
        """
        self._series = Series(info, max_layers=max_layers)
        self._pause = pause
        run, rank = self._series.run_and_rank
        self._common = f'run="{_escaped(run)}",rank="{rank}"'
        self._heads: dict[str, tuple[tuple[Labels, ...], list[str]]] = {}

    def render(self, snapshot: Snapshot, form: str = TEXT) -> bytes:
        """The snapshot in one of the content types `TEXT` and `OPENMETRICS`."""
        return exposition([self.lines(snapshot, form)], form)

    def lines(self, snapshot: Snapshot, form: str = TEXT) -> Lines:
        """The samples alone, to be shown beside those of other runs."""
        return {
            family.spec.name: list(
                self._histogram(family, with_exemplars=form == OPENMETRICS)
                if isinstance(family, HistogramFamily)
                else self._samples(family)
            )
            for family in self._series.families(snapshot)
        }

    def _samples(self, family: Family) -> Iterator[str]:
        heads = self._heads_of(family)
        for start in range(0, len(heads), CHUNK):
            if start:
                self._pause()
            end = start + CHUNK
            yield _lines(heads[start:end], family.values[start:end])

    def _heads_of(self, family: Family) -> list[str]:
        """All but value and end of each line, kept as long as the labels stay the same."""
        name = family.spec.name
        kept = self._heads.get(name)
        if kept is None or kept[0] != family.labels:
            kept = (family.labels, list(self._new_heads(family)))
            self._heads[name] = kept
        return kept[1]

    def _new_heads(self, family: Family) -> Iterator[str]:
        names = family.spec.labels
        for count, values in enumerate(family.labels, start=1):
            if count % CHUNK == 0:
                self._pause()
            pairs = zip(names, values, strict=True)
            own = "".join(f',{name}="{_escaped(value)}"' for name, value in pairs)
            yield f"{family.spec.full_name}{{{self._common}{own}}} "

    def _histogram(self, family: HistogramFamily, *, with_exemplars: bool) -> Iterator[str]:
        name, histogram = family.spec.full_name, family.histogram
        bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
        totals = list(accumulate(histogram.counts))
        for bound, total, exemplar in zip(bounds, totals, histogram.exemplars, strict=True):
            tail = _exemplar(exemplar) if with_exemplars and exemplar is not None else ""
            yield f'{name}_bucket{{{self._common},le="{bound}"}} {total}{tail}\n'
        yield f"{name}_count{{{self._common}}} {totals[-1]}\n"
        yield f"{name}_sum{{{self._common}}} {_number(histogram.sum)}\n"


def exposition(runs: Iterable[Lines], form: str = TEXT) -> bytes:
    """One answer of the lines of any number of runs, which differ in their labels."""
    runs = list(runs)
    pieces: list[str] = []
    for name, header in _HEADERS[form].items():
        lines = [line for run in runs for line in run.get(name, ())]
        if lines:
            pieces += (header, *lines)
    if form == OPENMETRICS:
        pieces.append("# EOF\n")
    return "".join(pieces).encode()


def agent_lines(values: Mapping[str, Mapping[Labels, float]]) -> Lines:
    """Lines of what a node agent says of itself: values by AGENT_METRICS and labels."""
    return {name: list(_plain(AGENT_METRICS[name], values[name])) for name in values}


def _plain(spec: MetricSpec, values: Mapping[Labels, float]) -> Iterator[str]:
    for labels, value in values.items():
        pairs = zip(spec.labels, labels, strict=True)
        own = ",".join(f'{name}="{_escaped(label)}"' for name, label in pairs)
        yield f"{spec.full_name}{f'{{{own}}}' if own else ''} {_number(value)}\n"


def _lines(heads: list[str], values: list[float]) -> str:
    text: Iterable[str] = map(repr if all(map(math.isfinite, values)) else _number, values)
    return "".join(chain.from_iterable(zip(heads, text, ["\n"] * len(heads), strict=True)))


def _number(value: float) -> str:
    text = repr(value)
    return SPECIAL.get(text, text)


def _escaped(value: str) -> str:
    return value.translate(ESCAPES)


def _exemplar(exemplar: Exemplar) -> str:
    return f' # {{step="{exemplar.step}"}} {_number(exemplar.value)} {exemplar.time!r}'


def _header(spec: MetricSpec, form: str) -> str:
    """The text format knows no infos and names each family after its samples."""
    if form == OPENMETRICS:
        name, kind, help_ = spec.family, spec.type, _escaped(spec.help)
    else:
        kind = "gauge" if spec.type == "info" else spec.type
        name, help_ = spec.full_name, spec.help.translate(HELP_ESCAPES)
    return f"# HELP {name} {help_}\n# TYPE {name} {kind}\n"


_HEADERS = {
    form: {name: _header(spec, form) for name, spec in (METRICS | AGENT_METRICS).items()}
    for form in (TEXT, OPENMETRICS)
}
