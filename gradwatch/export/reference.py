"""`docs/metrics.md` from the METRICS table.

python -m gradwatch.export.reference > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gradwatch.export.metrics import AGENT_METRICS, END_METRICS, METRICS, MetricSpec

__all__ = ["reference_text"]

_HEAD = """\
# Metrics

<!-- written by python -m gradwatch.export.reference -->

What `/metrics` has, of a run itself (port 9464 + `LOCAL_RANK`) and of a node agent
(`gradwatch serve`). Names are API: they change with an entry in the changelog. All have the
labels `run` and `rank`, but those of a node agent about itself. A counter is there from the
start, at 0. Series with `layer` come from rank 0, for at most 512 layers;
`gradwatch_series_dropped` says how many are left out. Where a metric needs something, it is
absent without it.

A one-step spike cannot hide between two scrapes: it is in `gradwatch_events_total`, in
`gradwatch_last_event_timestamp_seconds` if it was an alert, in `gradwatch_total_norm_window_max`
for a minute, and in `gradwatch_total_norm_distribution`, whose buckets carry the step as an
exemplar. NaN is an event too: no comparison finds a gauge that is NaN.

| metric | type | labels | what it is | needs |
| --- | --- | --- | --- | --- |
"""

_ENDED = """\
With `attach(..., pushgateway=...)`, beside `gradwatch_last_event_timestamp_seconds`; see
[ends.md](ends.md). They have names of their own, so that no rule takes a run that has ended for one
that stands still.

"""


def reference_text() -> str:
    """The whole page."""
    table = "\n".join(_HEAD.splitlines()[-2:]) + "\n"
    parts = [_HEAD, *_rows(METRICS.values())]
    parts += ["\n## Of a node agent about itself\n\n", table, *_rows(AGENT_METRICS.values())]
    parts += ["\n## Of a run that has ended, at a Pushgateway\n\n", _ENDED, table]
    parts += _rows(END_METRICS.values())
    return "".join(parts)


def _rows(specs: Iterable[MetricSpec]) -> Iterator[str]:
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        yield f"| `{spec.full_name}` | {spec.type} | {labels} | {spec.help} | {spec.needs} |\n"


if __name__ == "__main__":
    print(reference_text(), end="")
