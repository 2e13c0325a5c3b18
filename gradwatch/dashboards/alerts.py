"""The alerts: when somebody should look, and what they read first.

Every expression keeps to Prometheus 2.42 and ends in one series per run, however many ranks it
has. Only alerts that ask for a human now are critical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["THRESHOLDS", "Alert", "Recording", "Thresholds", "alerts", "duration", "recordings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What the rules compare with, in seconds unless said otherwise."""

    event_seconds: int = 300
    """How long an anomaly keeps its alert open: longer than Alertmanager's group_interval is
    usually set, and than any scrape interval, so that one bad step cannot slip between two."""

    stalled_seconds: int = 600
    """Without a step for this long a run counts as stalled: evaluation and checkpoints of most
    runs take less."""

    stalled_factor: float = 10.0
    """... or for this many mean steps, whichever is longer: a slow run is not a stalled one."""

    stalled_for_seconds: int = 120
    """Prometheus itself may just have restarted: a page waits for a second look."""

    down_for_seconds: int = 120
    """A few failed scrapes in a row, so that a busy node or one lost packet tells nobody."""

    goodbye_seconds: int = 43_200
    """How long a vanished exporter is remembered: whoever went home finds it in the morning."""

    enforcing_seconds: int = 300
    """How long a lapse of enforcement keeps its alert open, so that it cannot flap."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording rule."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An alert rule without its runbook link, which `rules` adds to every one."""

    name: str
    severity: Literal["critical", "warning"]
    expr: str
    summary: str
    """A sentence that names the run."""

    description: str
    """The values in human units, and what to do first."""

    for_seconds: int = 0
    """0 for what happened at one moment, longer for a condition that may pass."""

    event: str = ""
    """The kind of anomaly whose alerts it tells of, where it is about one: a run may post it
    itself."""


def recordings() -> tuple[Recording, ...]:
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


def alerts(thresholds: Thresholds = THRESHOLDS) -> tuple[Alert, ...]:
    return (
        _exploding(thresholds),
        _nonfinite(thresholds),
        _stalled(thresholds),
        _exporter_down(thresholds),
        _not_enforcing(thresholds),
    )


def duration(seconds: int) -> str:
    """A PromQL duration in the largest unit that divides it: 600 is `10m`."""
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _happened(event: str, seconds: int) -> str:
    """The two arms of an event alert, each of which covers what the other one misses.

    `increase()` sees nothing when the series is born with its first event, the timestamp is off
    when the clocks of trainer and Prometheus differ. The maximum over time keeps the event of a
    process that died right after it.
    """
    window = duration(seconds)
    return (
        "time() - (max by (job, run) (max_over_time("
        f'gradwatch_last_event_timestamp_seconds{{event="{event}"}}[{window}])) > 0) < {seconds}\n'
        "or\n"
        "sum by (job, run) (increase("
        f'gradwatch_events_total{{event="{event}",level="alert"}}[{window}])) > 0\n'
    )


def _now(query: str, form: str = "humanize") -> str:
    """A template that asks Prometheus for one value; `SELF` in the query selects the run."""
    asked = query.replace("{SELF}", "{job=%q,run=%q}")
    return (
        f'{{{{ with printf "{asked}" $labels.job $labels.run | query }}}}'
        f"{{{{ . | first | value | {form} }}}}{{{{ else }}}}unknown{{{{ end }}}}"
    )


def _exploding(thresholds: Thresholds) -> Alert:
    norm = _now("max(gradwatch_total_norm_window_max{SELF})")
    return Alert(
        name="GradwatchExplodingGradient",
        severity="critical",
        event="exploding",
        expr=_happened("exploding", thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} are exploding.",
        description=(
            f"The largest total norm of the last minute is {norm}. "
            "First find the layer that moved first (dashboard gradwatch / run, section Layers), "
            "then compare the learning rate and the batch of that step. If the loss has jumped, "
            "go back to the last checkpoint before the episode."
        ),
    )


def _nonfinite(thresholds: Thresholds) -> Alert:
    skipped = _now("sum(increase(gradwatch_skipped_steps_total{SELF}[5m]))", 'printf "%.0f"')
    return Alert(
        name="GradwatchNonFiniteGradient",
        severity="critical",
        event="nonfinite",
        expr=_happened("nonfinite", thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} hold NaN or Inf.",
        description=(
            f"Steps skipped in the last 5 minutes: {skipped}. "
            "First look at the loss: if it is NaN too, the weights are lost, stop the run and go "
            "back to a checkpoint; if it is finite, look at the loss scale and at the batch."
        ),
    )


def _stalled(thresholds: Thresholds) -> Alert:
    least, window = thresholds.stalled_seconds, duration(thresholds.stalled_seconds)
    mean = _now("run:gradwatch_step_duration_seconds:mean{SELF}", "humanizeDuration")
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
    step = _now(f"max(last_over_time(gradwatch_step{{SELF}}[{memory}]))", 'printf "%.0f"')
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


def _not_enforcing(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.enforcing_seconds)
    errors = _now("sum(increase(gradwatch_hook_errors_total{SELF}[15m]))", 'printf "%.0f"')
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
            f"Errors of gradwatch in the last 15 minutes: {errors}. "
            "Gradients go to the optimizer unclipped. First read the run's log for the error, "
            "then decide whether it may go on like this or stops at the next checkpoint."
        ),
    )
