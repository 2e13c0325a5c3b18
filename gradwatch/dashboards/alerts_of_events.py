"""Alerts that the detectors raise: what went wrong in a gradient, a weight, a loss or a rank.

The detectors ask for persistence themselves and their rates of false alarms are measured, so that
no rule here waits.
"""

from __future__ import annotations

from gradwatch.dashboards.alert import (
    IN_RECORDING,
    Alert,
    Thresholds,
    counted,
    duration,
    happened,
    how_many,
    kinds,
    now,
    which,
    words,
)
from gradwatch.policy.detectors import Exploding

__all__ = ["alerts_of_events"]

VANISHING = ("vanishing", "collapsed", "dead")
UPDATES = ("stalled_update", "oversized_update")
PRECISION = ("underflow", "swallowed_update")


def alerts_of_events(thresholds: Thresholds) -> tuple[Alert, ...]:
    return (
        _exploding(thresholds),
        _nonfinite(thresholds),
        _rank_divergence(thresholds),
        _rank_outlier(thresholds),
        _vanishing(thresholds),
        _updates(thresholds),
        _precision(thresholds),
        _loss(thresholds),
        _loss_scale(thresholds),
        _stuck(thresholds),
        _unused(thresholds),
    )


def _exploding(thresholds: Thresholds) -> Alert:
    window, times = duration(thresholds.event_seconds), f"{Exploding().times:g}"
    norm = now(f"max(max_over_time(gradwatch_total_norm_window_max{{SELF}}[{window}]))")
    worst = which(
        f"topk(1, max by (layer) (max_over_time(gradwatch_grad_norm{{SELF}}[{window}])) "
        "/ max by (layer) (quantile_over_time(0.5, gradwatch_grad_norm{SELF}[1h]) > 0) "
        f"> {times})",
        "layer",
        otherwise=f"none above {times} in what was scraped, `gradwatch report RECORDING` names it",
    )
    events = ("exploding",)
    return Alert(
        name="GradwatchExplodingGradient",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} are exploding.",
        description=(
            f"The largest total norm of the last {words(thresholds.event_seconds)} is {norm}. "
            f"Layer furthest above its median of the last hour, times it: {worst}. "
            "First find the layer that moved first (dashboard gradwatch / run, section Layers), "
            "then compare the learning rate and the batch of that step. If the loss has jumped, "
            "go back to the last checkpoint before the episode."
        ),
    )


def _nonfinite(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.event_seconds)
    # increase() sees nothing of a series that is born with its first skipped step.
    skipped = how_many(
        f"sum(max by (reason) (max_over_time(gradwatch_skipped_steps_total{{SELF}}[{window}])))"
    )
    events = ("nonfinite",)
    return Alert(
        name="GradwatchNonFiniteGradient",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} hold NaN or Inf.",
        description=(
            f"Steps skipped in this run so far: {skipped} "
            "(with mode: shadow they were taken all the same). "
            "First look at the loss: if it is NaN too, the weights are lost, stop the run and go "
            "back to a checkpoint; if it is finite, look at the loss scale and at the batch."
        ),
    )


def _rank_divergence(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.event_seconds)
    ranks = how_many(f"count(count by (rank) (last_over_time(gradwatch_info{{SELF}}[{window}])))")
    events = ("rank_divergence",)
    return Alert(
        name="GradwatchRankDivergence",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Ranks of run {{ $labels.run }} have different weights.",
        description=(
            f"Ranks that answered in the last {words(thresholds.event_seconds)}: {ranks}. "
            "Weights that must be equal on all of them are not, and they will not become equal "
            "again. First read which layer and which rank in the log of rank 0, then stop and go "
            "back to the last checkpoint before that step."
        ),
        dashboard="gradwatch-distributed",
    )


def _rank_outlier(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.event_seconds)
    largest = now(f"max(max_over_time(gradwatch_local_norm{{SELF}}[{window}]))")
    least = now(f"min(min_over_time(gradwatch_local_norm{{SELF}}[{window}]))")
    events = ("rank_outlier",)
    return Alert(
        name="GradwatchRankOutlier",
        severity="warning",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="One rank of run {{ $labels.run }} has gradients unlike the others.",
        description=(
            f"Norms of the ranks' own gradients in the last {words(thresholds.event_seconds)} lie "
            f"between {least} and {largest}. "
            "First read which rank in the log of rank 0, then compare its data shard and its seed "
            "with the others; if both are right, suspect its hardware."
        ),
        dashboard="gradwatch-distributed",
    )


def _vanishing(thresholds: Thresholds) -> Alert:
    return Alert(
        name="GradwatchVanishingGradient",
        severity="warning",
        events=VANISHING,
        expr=happened(VANISHING, thresholds.event_seconds),
        summary="Layers of run {{ $labels.run }} hardly get a gradient any more.",
        description=(
            f"Kinds, and layers in each: {_open(VANISHING, thresholds)}. "
            "First see in the heat map whether the layers before them went dark too: then the "
            "gradient is lost on the way; a layer alone is dead, saturated or cut off."
        ),
    )


def _updates(thresholds: Thresholds) -> Alert:
    return Alert(
        name="GradwatchUpdateOutOfRange",
        severity="warning",
        events=UPDATES,
        expr=happened(UPDATES, thresholds.event_seconds),
        summary="Updates of run {{ $labels.run }} are too large or too small for its weights.",
        description=(
            f"Kinds, and layers in each: {_open(UPDATES, thresholds)}. "
            "First compare the learning rate of these layers' group with what was planned, then "
            "the panel Update over weights: a ratio above 0.3 forgets, below 1e-7 stands still."
        ),
        dashboard="gradwatch-layer",
    )


def _precision(thresholds: Thresholds) -> Alert:
    return Alert(
        name="GradwatchPrecisionLost",
        severity="warning",
        events=PRECISION,
        expr=counted(PRECISION, thresholds.window_seconds),
        summary="Run {{ $labels.run }} loses gradients or updates to rounding.",
        description=(
            f"Found in the last {words(thresholds.window_seconds)}: "
            f"{_found(PRECISION, thresholds)}. "
            "First see the kind: underflow asks for a larger loss scale or bfloat16, "
            "swallowed_update for float32 master weights."
        ),
        dashboard="gradwatch-layer",
    )


def _loss(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    since = f"over_time(gradwatch_loss{{SELF}}[{window}])"
    largest, last = now(f"max(max_{since})"), now(f"max(last_{since})")
    spike, slow = ("loss_spike",), ("diverging",)
    return Alert(
        name="GradwatchLossRising",
        severity="warning",
        events=(*spike, *slow),
        expr=happened(spike, thresholds.event_seconds)
        + "or\n"
        + counted(slow, thresholds.window_seconds),
        summary="The loss of run {{ $labels.run }} rises.",
        description=(
            f"Its largest value of the last {words(thresholds.window_seconds)} is {largest}, its "
            f"last one {last}. "
            "First see whether the norm rose before it: then it is the optimization (learning "
            "rate, warm-up); a loss that rises alone is the data."
        ),
    )


def _loss_scale(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.event_seconds)
    scale = now(f"min(min_over_time(gradwatch_loss_scale{{SELF}}[{window}]))", 'printf "%g"')
    events = ("loss_scale_collapse",)
    return Alert(
        name="GradwatchLossScaleCollapsed",
        severity="warning",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="The loss scale of run {{ $labels.run }} finds no level.",
        description=(
            f"Its least value of the last {words(thresholds.event_seconds)} is {scale}. "
            "Steps are dropped and nothing is learnt in them. "
            "First see whether the loss is finite: then an operation overflows in float16, use "
            "bfloat16 or find it; if it is not, the weights are lost."
        ),
        dashboard="gradwatch-clipping",
    )


def _stuck(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.window_seconds)
    step = now(f"max(max_over_time(gradwatch_step{{SELF}}[{window}]))", 'printf "%.0f"')
    events = ("stuck",)
    return Alert(
        name="GradwatchGradientStuck",
        severity="warning",
        events=events,
        expr=counted(events, thresholds.window_seconds),
        summary="Run {{ $labels.run }} goes through its loop without learning.",
        description=(
            f"The last step is {step}. The norm is the same to the last bit step after step, or "
            "steps have stopped. First see whether the loader gives the same batch again, and "
            "whether zero_grad() and backward() are both still called."
        ),
    )


def _unused(thresholds: Thresholds) -> Alert:
    return Alert(
        name="GradwatchParameterUnused",
        severity="info",
        events=("unused",),
        expr=counted(("unused",), thresholds.window_seconds),
        summary="Run {{ $labels.run }} has parameters that never get a gradient.",
        description=(
            f"Found in the last {words(thresholds.window_seconds)}: "
            f"{_found(('unused',), thresholds)}. "
            "First read which in the log or the report, then freeze them or call them: an "
            "optimizer with weight decay shrinks them meanwhile."
        ),
        dashboard="gradwatch-layer",
    )


def _open(events: tuple[str, ...], thresholds: Thresholds) -> str:
    """Kinds with the largest number of layers that their episode has covered."""
    window = duration(thresholds.event_seconds)
    layers = f"max_over_time(gradwatch_anomalous_layers{{SELF,{kinds(events)}}}[{window}])"
    return which(f"max by (event) ({layers}) > 0", "event", otherwise=IN_RECORDING)


def _found(events: tuple[str, ...], thresholds: Thresholds) -> str:
    total = f"gradwatch_events_total{{SELF,{kinds(events)}}}"
    window = duration(thresholds.window_seconds)
    return which(
        f"sum by (event) (increase({total}[{window}])) > 0", "event", otherwise=IN_RECORDING
    )
