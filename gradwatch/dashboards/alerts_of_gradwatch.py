"""Alerts on gradwatch itself: training goes on, but what it shows is not whole."""

from __future__ import annotations

from gradwatch.dashboards.alert import (
    Alert,
    Thresholds,
    duration,
    how_many,
    now,
    which,
    words,
)

__all__ = ["alerts_of_gradwatch"]


def alerts_of_gradwatch(thresholds: Thresholds) -> tuple[Alert, ...]:
    return (
        _hook_errors(thresholds),
        _overhead(thresholds),
        _records_dropped(thresholds),
        _series_dropped(thresholds),
        _agent(thresholds),
    )


def _hook_errors(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    errors = f"sum by (component) (increase(gradwatch_hook_errors_total{{SELF}}[{window}])) > 0"
    return Alert(
        name="GradwatchHookErrors",
        severity="warning",
        expr=f"sum by (job, run) (increase(gradwatch_hook_errors_total[{window}])) > 0\n",
        summary="gradwatch itself has failed in run {{ $labels.run }}; training goes on.",
        description=(
            f"Parts that failed in the last {words(thresholds.window_seconds)}: "
            f"{which(errors, 'component', otherwise='none')}. "
            "First read the log of the run: each kind of error is written there once, with its "
            "traceback. Report it; until then what that part shows is missing."
        ),
        dashboard="gradwatch-exporter",
    )


def _overhead(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    mean = now(
        f"last_over_time(run:gradwatch_step_duration_seconds:mean{{SELF}}[{window}])",
        "humanizeDuration",
    )
    return Alert(
        name="GradwatchOverheadHigh",
        severity="warning",
        for_seconds=thresholds.level_seconds,
        expr=(
            f"sum by (job, run) (rate(gradwatch_overhead_seconds_total[{window}]))\n"
            f"/ (sum by (job, run) (rate(gradwatch_step_duration_seconds_sum[{window}])) > 0)\n"
            f"> {thresholds.overhead_share:g}\n"
        ),
        summary="gradwatch takes more of each step of run {{ $labels.run }} than it should.",
        description=(
            f"It takes {{{{ $value | humanizePercentage }}}} of a step of {mean} on the training "
            "thread, the clipping that it does in place of your loop included. First see whether "
            "the steps are very short or the tensors very many: look at samples less often "
            "(`detect: {every: 50}`) or leave out detectors that nobody reads."
        ),
        dashboard="gradwatch-exporter",
    )


def _records_dropped(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    size = now(f"sum(max_over_time(gradwatch_recording_bytes{{SELF}}[{window}]))", "humanize1024")
    return Alert(
        name="GradwatchRecordsDropped",
        severity="warning",
        expr=f"max by (job, run) (increase(gradwatch_records_dropped_total[{window}])) > 0\n",
        summary="The recording of run {{ $labels.run }} has gaps.",
        description=(
            f"Steps missing in the last {words(thresholds.window_seconds)}: "
            "{{ $value | printf `%.0f` }}; the recording "
            f"has {size}B. "
            "First see where it is written: a network file system or a full disk is slower than "
            "the steps come. Put it on a local disk."
        ),
        dashboard="gradwatch-exporter",
    )


def _series_dropped(thresholds: Thresholds) -> Alert:
    layers = how_many("count(gradwatch_grad_norm{SELF})")
    return Alert(
        name="GradwatchSeriesDropped",
        severity="info",
        for_seconds=thresholds.level_seconds,
        expr="max by (job, run) (gradwatch_series_dropped) > 0\n",
        summary="Run {{ $labels.run }} has more layers than it exports.",
        description=(
            "Layers without series of their own: {{ $value | printf `%.0f` }}; "
            f"with: {layers}. First see whether you miss them: the page and the recording have "
            "all. Group the layers more coarsely (`layers: {depth: 2}`) to see them in Prometheus."
        ),
        dashboard="gradwatch-exporter",
    )


def _agent(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    return Alert(
        name="GradwatchAgentErrors",
        severity="warning",
        # A recording that cannot be read is no error of the agent. Files that have lain there for
        # longer are known.
        expr=(
            "max by (job, instance) (\n"
            f"  increase(gradwatch_agent_errors_total[{window}])\n"
            "  + (gradwatch_agent_unreadable_files\n"
            f"  - min_over_time(gradwatch_agent_unreadable_files[{window}]))\n"
            ") > 0\n"
        ),
        summary="The node agent on {{ $labels.instance }} fails to follow its runs.",
        description=(
            f"Errors, and files that it can read no longer, in the last "
            f"{words(thresholds.window_seconds)}: "
            "{{ $value | printf `%.0f` }}. "
            "First read its log (`gradwatch serve`), which names the recording; the runs "
            "themselves are not touched, but their metrics may stand still."
        ),
        dashboard="gradwatch-exporter",
    )
