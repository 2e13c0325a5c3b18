"""Alerts on what the policy does to the gradient, and on levels that no single step shows."""

from __future__ import annotations

from gradwatch.dashboards.alert import (
    Alert,
    Recording,
    Thresholds,
    counted,
    duration,
    how_many,
    now,
    which,
    words,
)

__all__ = ["alerts_of_decisions", "recordings_of_decisions"]

NORM = "run:gradwatch_total_norm_window_max:max"


def recordings_of_decisions(thresholds: Thresholds) -> tuple[Recording, ...]:
    window = duration(thresholds.window_seconds)
    return (
        Recording(record=NORM, expr="max by (job, run) (gradwatch_total_norm_window_max)\n"),
        Recording(
            record="run:gradwatch_steps:increase",
            # All ranks count the same steps.
            expr=f"max by (job, run) (increase(gradwatch_steps_total[{window}]))\n",
        ),
        Recording(
            record="run:gradwatch_clipped_share:busiest_rule",
            # A sum over rules would say 90 % of three rules that clip 30 % each.
            expr=(
                "max by (job, run) (\n"
                "  max by (job, run, rule) "
                f"(increase(gradwatch_clipped_steps_total[{window}]))\n"
                ")\n"
                "/ (run:gradwatch_steps:increase > 0)\n"
            ),
        ),
        Recording(
            record="run:gradwatch_skipped_steps:increase",
            expr=(
                "sum by (job, run) (\n"
                "  max by (job, run, reason) "
                f"(increase(gradwatch_skipped_steps_total[{window}]))\n"
                ")\n"
            ),
        ),
    )


def alerts_of_decisions(thresholds: Thresholds) -> tuple[Alert, ...]:
    return (
        _spiking(thresholds),
        _trend(thresholds),
        _clipping(thresholds),
        _elsewhere(thresholds),
        _skipping(thresholds),
        _not_enforcing(thresholds),
        _policy_refused(thresholds),
    )


def _spiking(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    norm = now(f"max(max_over_time(gradwatch_total_norm_window_max{{SELF}}[{window}]))")
    return Alert(
        name="GradwatchGradNormSpiking",
        severity="warning",
        events=("spike",),
        expr=(
            "max by (job, run) (\n"
            f'  increase(gradwatch_events_total{{event="spike"}}[{window}])\n'
            ") > on (job, run) clamp_min(\n"
            f"  {thresholds.spike_share:g} * run:gradwatch_steps:increase, "
            f"{thresholds.spike_least}\n"
            ")\n"
        ),
        summary="Gradients of run {{ $labels.run }} spike more often than data explains.",
        description=(
            f"Spikes in the last {words(thresholds.window_seconds)}: "
            f"{{{{ $value | printf `%.0f` }}}}; the largest total norm in that time is {norm}. "
            "First look at the batches of these steps in the recording; if they have nothing in "
            "common, lower the learning rate: spikes precede explosions."
        ),
    )


def _trend(thresholds: Thresholds) -> Alert:
    median = now(f"max(quantile_over_time(0.5, {NORM}{{SELF}}[6h] offset 10m))")
    return Alert(
        name="GradwatchGradNormTrend",
        severity="warning",
        for_seconds=thresholds.trend_for_seconds,
        # A median of minutes is none: the series must be an hour old.
        expr=(
            f"{NORM}\n"
            f"> {thresholds.trend_factor:g} * quantile_over_time(0.5, {NORM}[6h] offset 10m)\n"
            f"and on (job, run) {NORM} offset 1h\n"
        ),
        summary="The norm of run {{ $labels.run }} has left its level of the last hours.",
        description=(
            f"It is {{{{ $value | printf `%.4g` }}}}, its median over six hours {median}. "
            "First lay the learning rate and the micro-batches per step beside it: where neither "
            "has changed, find the layers that grew, in the table of the largest layers."
        ),
    )


def _clipping(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    busiest = which(
        f"topk(1, max by (rule) (increase(gradwatch_clipped_steps_total{{SELF}}[{window}]))) > 0",
        "rule",
        otherwise="none",
    )
    return Alert(
        name="GradwatchClippingSaturated",
        severity="warning",
        events=("clip_saturated",),
        for_seconds=thresholds.level_seconds,
        expr=f"run:gradwatch_clipped_share:busiest_rule > {thresholds.clipped_share:g}\n",
        summary="Nearly every step of run {{ $labels.run }} is clipped.",
        description=(
            "The busiest rule changed {{ $value | humanizePercentage }} of the steps of the last "
            f"{words(thresholds.window_seconds)}: {busiest}. "
            "First decide whether that is meant: a limit below the usual norm makes the learning "
            "rate meaningless. `gradwatch advise RECORDING` says which limit would not."
        ),
        dashboard="gradwatch-clipping",
    )


def _elsewhere(thresholds: Thresholds) -> Alert:
    # Nothing passes above the limit of somebody else: the largest norm is that limit.
    window = duration(thresholds.window_seconds)
    norm = now(f"max(max_over_time(gradwatch_total_norm{{SELF}}[{window}]))")
    events = ("clipped_elsewhere",)
    return Alert(
        name="GradwatchClippedElsewhere",
        severity="warning",
        events=events,
        expr=counted(events, thresholds.window_seconds),
        summary="Run {{ $labels.run }} clips its gradient before gradwatch measures it.",
        description=(
            "The total norm comes back to the same number digit by digit while the layers differ; "
            f"its largest value of the last {words(thresholds.window_seconds)} is {norm}. "
            "No explosion shows behind that limit, and the policy sees what is left of the "
            "gradient. First look for clip_grad_norm_ in the loop, or for the clipping of its "
            "trainer, and take it out: the policy is to clip."
        ),
        dashboard="gradwatch-clipping",
    )


def _skipping(thresholds: Thresholds) -> Alert:
    share = now(
        "max(run:gradwatch_skipped_steps:increase{SELF} / run:gradwatch_steps:increase{SELF})",
        "humanizePercentage",
    )
    return Alert(
        name="GradwatchStepsSkipped",
        severity="warning",
        expr=(
            "run:gradwatch_skipped_steps:increase\n"
            "> on (job, run) clamp_min(\n"
            f"  {thresholds.skipped_share:g} * run:gradwatch_steps:increase, "
            f"{thresholds.skipped_least}\n"
            ")\n"
        ),
        summary="Run {{ $labels.run }} drops more steps than it should.",
        description=(
            f"Steps dropped in the last {words(thresholds.window_seconds)}: "
            f"{{{{ $value | printf `%.0f` }}}}, {share} of all. "
            "First see the reason (dashboard gradwatch / clipping): a loss scaler that "
            "overflows, or a rule of the policy. The data of these steps is lost to the model, but "
            "for those that a policy with mode: shadow would have dropped."
        ),
        dashboard="gradwatch-clipping",
    )


def _not_enforcing(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.enforcing_seconds)
    errors = how_many(f"sum(max_over_time(gradwatch_hook_errors_total{{SELF}}[{window}]))")
    return Alert(
        name="GradwatchNotEnforcing",
        severity="critical",
        expr=(
            "min by (job, run) (\n"
            f"  min_over_time(gradwatch_enforcing[{window}])\n"
            '  and on (job, instance, run, rank) gradwatch_info{mode="enforce"}\n'
            ") == 0\n"
        ),
        summary="Run {{ $labels.run }} trains without the policy that it was started with.",
        description=(
            f"Errors of gradwatch so far: {errors}. "
            "Gradients go to the optimizer unclipped. First read the run's log for the error, "
            "then decide whether it may go on like this or stops at the next checkpoint."
        ),
        dashboard="gradwatch-exporter",
    )


def _policy_refused(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    return Alert(
        name="GradwatchPolicyRefused",
        severity="warning",
        expr=(
            "max by (job, run) (increase("
            f'gradwatch_events_total{{event="policy",level="warning"}}[{window}])) > 0\n'
        ),
        summary="Run {{ $labels.run }} did not take over the policy file that was written.",
        description=(
            f"Refused in the last {words(thresholds.window_seconds)}: "
            "{{ $value | printf `%.0f` }}. The policy before it stays in force. "
            "First read the line and the mend in the run's log, or run "
            "`gradwatch check POLICY`; a running policy may change its numbers only."
        ),
        dashboard="gradwatch-clipping",
    )
