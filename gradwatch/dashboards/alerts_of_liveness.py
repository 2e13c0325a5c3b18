"""Alerts on runs that make no steps, do not answer, or are gone."""

from __future__ import annotations

from gradwatch.dashboards.alert import Alert, Recording, Thresholds, duration, now

__all__ = ["alerts_of_liveness", "recordings_of_liveness"]


def recordings_of_liveness() -> tuple[Recording, ...]:
    return (
        Recording(
            record="run:gradwatch_step_duration_seconds:mean",
            expr=(
                "sum by (job, run) (gradwatch_step_duration_seconds_sum)\n"
                "/ (sum by (job, run) (gradwatch_step_duration_seconds_count) > 0)\n"
            ),
        ),
        Recording(
            record="instance:gradwatch_unfinished:max",
            expr='max by (job, instance) (gradwatch_run_state{state=~"running|crashed"})\n',
        ),
    )


def alerts_of_liveness(thresholds: Thresholds) -> tuple[Alert, ...]:
    return (_stalled(thresholds), _exporter_down(thresholds), _disappeared(thresholds))


def _stalled(thresholds: Thresholds) -> Alert:
    least, window = thresholds.stalled_seconds, duration(thresholds.stalled_seconds)
    mean = now("run:gradwatch_step_duration_seconds:mean{SELF}", "humanizeDuration")
    return Alert(
        name="GradwatchTrainingStalled",
        severity="critical",
        for_seconds=thresholds.stalled_for_seconds,
        # A step counted within the window outvotes the timestamp, whatever the trainer's clock.
        expr=(
            "(time() - max by (job, run) (gradwatch_last_step_timestamp_seconds > 0))\n"
            "> on (job, run) (\n"
            f"  clamp_min({thresholds.stalled_factor:g} * "
            f"run:gradwatch_step_duration_seconds:mean, {least})\n"
            f"  or {least} * group by (job, run) (gradwatch_last_step_timestamp_seconds)\n"
            ")\n"
            "unless on (job, run) "
            'max by (job, run) (gradwatch_run_state{state=~"finished|stopped"}) == 1\n'
            "unless on (job, run) "
            f"max by (job, run) (changes(gradwatch_steps_total[{window}])) > 0\n"
        ),
        summary="Run {{ $labels.run }} makes no steps any more.",
        description=(
            "The last optimizer step was {{ $value | humanizeDuration }} ago, "
            f"a mean step takes {mean}. "
            "First dump the stacks of the process (py-spy dump --pid PID) before you restart it: "
            "a data loader, a checkpoint write or a collective that waits for a lost rank."
        ),
    )


def _exporter_down(thresholds: Thresholds) -> Alert:
    memory = duration(thresholds.goodbye_seconds)
    step = now(f"max(last_over_time(gradwatch_step{{SELF}}[{memory}]))", 'printf "%.0f"')
    return Alert(
        name="GradwatchExporterDown",
        severity="warning",
        for_seconds=thresholds.down_for_seconds,
        # An instance is a port that the next run may take: its last word decides, not each run's.
        # A node agent answers for the dead: it says itself that a run has crashed.
        expr=(
            "count by (job, run) (\n"
            "  max by (job, instance, run) "
            f'(last_over_time(gradwatch_run_state{{state=~"running|crashed"}}[{memory}])) == 1\n'
            "  and on (job, instance) "
            f"last_over_time(instance:gradwatch_unfinished:max[{memory}]) == 1\n"
            "  and on (job, instance) up == 0\n"
            "  or\n"
            '  max by (job, instance, run) (gradwatch_run_state{state="crashed"}) == 1\n'
            ")\n"
        ),
        summary="Run {{ $labels.run }} has died or cannot be scraped.",
        description=(
            "Exporters that do not answer, or machines it has died on: {{ $value }}; "
            f"the last step seen was {step}. "
            "First see whether the process is alive: if not, read its log and the scheduler's for "
            "a kill, and open the recording; if it is, check its port and the network."
        ),
    )


def _disappeared(thresholds: Thresholds) -> Alert:
    memory = duration(thresholds.goodbye_seconds)
    step = now(f"max(last_over_time(gradwatch_step{{SELF}}[{memory}]))", 'printf "%.0f"')
    return Alert(
        name="GradwatchRunDisappeared",
        severity="critical",
        for_seconds=thresholds.disappeared_for_seconds,
        # A target that is still listed is GradwatchExporterDown's, or another run's by now.
        expr=(
            "count by (job, run) (\n"
            "  max by (job, instance, run) "
            f'(last_over_time(gradwatch_run_state{{state="running"}}[{memory}])) == 1\n'
            "  unless on (job, instance) up\n"
            ")\n"
            "unless on (job, run) group by (job, run) (gradwatch_info)\n"
        ),
        summary="Run {{ $labels.run }} was running and is gone, its target too.",
        description=(
            "Processes that went without a word: {{ $value }}; "
            f"the last step seen was {step}. "
            "First ask the scheduler: preempted, killed for memory, or its node lost. The "
            "recording holds every step up to the last."
        ),
    )
