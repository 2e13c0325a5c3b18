"""What watching itself costs, and what it could not keep up with: a row of panels."""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import Json, heatmap, table, target, timeseries

__all__ = ["health", "health_lines"]

_OVERHEAD = """sum by (run) (rate(gradwatch_overhead_seconds_total[$__rate_interval]))
/ sum by (run) (rate(gradwatch_step_duration_seconds_sum[$__rate_interval]) > 0)"""


def health() -> Row:
    return Row(title="gradwatch itself", collapsed=True, lines=health_lines())


def health_lines() -> list[Line]:
    return [
        line(5, _what_runs()),
        line(7, _overhead(), _errors(), _dropped()),
        line(7, _series_dropped(), _recording(), _durations()),
    ]


def _what_runs() -> Json:
    return table(
        "What runs",
        "The version, policy and model behind each selected run, and its last step. Quote this "
        "line in a bug report; two runs that differ here are not comparable.",
        target(
            "max by (run, model, framework, policy, mode, version) (gradwatch_info)",
            now=True,
            form="table",
        ),
        target("max by (run) (gradwatch_step)", now=True, form="table"),
        unit="none",
        columns={
            "run": "Run",
            "model": "Model",
            "framework": "Framework",
            "policy": "Policy",
            "mode": "Mode",
            "version": "gradwatch",
            "Value #B": "Step",
        },
        sort_by="Run",
        descending=False,
    )


def _overhead() -> Json:
    return timeseries(
        "Share of the step that gradwatch takes",
        "Time on the training thread per step time. It should stay below a few percent; if not, "
        "group layers by module rather than by parameter.",
        target(_OVERHEAD, "{{run}}"),
        unit="percentunit",
        least=0,
        marks=((THRESHOLDS.overhead_share, "orange"),),
    )


def _errors() -> Json:
    return timeseries(
        "Errors of gradwatch itself",
        "Training goes on after each of these, in an enforcing run until the guard says stop. "
        "Any is a bug: report it with the log line of that component.",
        target(
            "sum by (run, component) (increase(gradwatch_hook_errors_total[$__rate_interval]))",
            "{{run}} {{component}}",
        ),
        unit="none",
        bars=True,
        least=0,
    )


def _dropped() -> Json:
    return timeseries(
        "Steps missing in the recording",
        "Steps that came faster than the recorder wrote. Above 0: put the recording on a local "
        "disk, or record fewer tensors.",
        target(
            "sum by (run) (increase(gradwatch_records_dropped_total[$__rate_interval]))", "{{run}}"
        ),
        unit="none",
        bars=True,
        least=0,
    )


def _series_dropped() -> Json:
    return timeseries(
        "Layer series left out",
        "Layers over the cap of the exporter, which have no series here. The recording has them "
        "all; group layers more coarsely to see them live.",
        target("max by (run) (gradwatch_series_dropped)", "{{run}}"),
        unit="none",
        least=0,
    )


def _recording() -> Json:
    return timeseries(
        "Size of the recording",
        "Bytes on disk. It levels off at the retention limit, where the oldest steps without an "
        "anomaly go first; export what you want to keep.",
        target("sum by (run) (gradwatch_recording_bytes)", "{{run}}"),
        unit="bytes",
        least=0,
    )


def _durations() -> Json:
    return heatmap(
        "Step duration, every step",
        "How many steps took how long. A second band above the first is evaluation, a checkpoint "
        "or a data loader that runs dry at regular steps.",
        target(
            "sum by (le) (increase(gradwatch_step_duration_seconds_bucket[$__rate_interval]))",
            "{{le}}",
            form="heatmap",
        ),
        unit="s",
    )
