"""Alerts that the detectors raise: what went wrong in a gradient, a weight, a loss or a rank.

The detectors ask for persistence themselves and their rates of false alarms are measured, so that
no rule here waits.
"""

from __future__ import annotations

from gradwatch.dashboards.alert import (
    Alert,
    Thresholds,
    counted,
    duration,
    happened,
    kinds,
    now,
    which,
    words,
)

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
    norm = now("max(gradwatch_total_norm_window_max{SELF})")
    window = duration(thresholds.event_seconds)
    worst = which(
        f"topk(1, max by (layer) (max_over_time(gradwatch_grad_norm{{SELF}}[{window}])) "
        "/ max by (layer) (quantile_over_time(0.5, gradwatch_grad_norm{SELF}[1h]) > 0))",
        "layer",
    )
    events = ("exploding",)
    return Alert(
        name="GradwatchExplodingGradient",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} are exploding.",
        description=(
            f"The largest total norm of the last minute is {norm}. "
            f"Layer furthest above its median of the last hour, times it: {worst}. "
            "First find the layer that moved first (dashboard gradwatch / run, section Layers), "
            "then compare the learning rate and the batch of that step. If the loss has jumped, "
            "go back to the last checkpoint before the episode."
        ),
    )


def _nonfinite(thresholds: Thresholds) -> Alert:
    window = duration(thresholds.event_seconds)
    skipped = now(
        f"sum(increase(gradwatch_skipped_steps_total{{SELF}}[{window}]))", 'printf "%.0f"'
    )
    events = ("nonfinite",)
    return Alert(
        name="GradwatchNonFiniteGradient",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Gradients of run {{ $labels.run }} hold NaN or Inf.",
        description=(
            f"Steps skipped in the last {words(thresholds.event_seconds)}: {skipped} "
            "(with mode: shadow they were taken all the same). "
            "First look at the loss: if it is NaN too, the weights are lost, stop the run and go "
            "back to a checkpoint; if it is finite, look at the loss scale and at the batch."
        ),
    )


def _rank_divergence(thresholds: Thresholds) -> Alert:
    ranks = now("count(gradwatch_info{SELF})", 'printf "%.0f"')
    events = ("rank_divergence",)
    return Alert(
        name="GradwatchRankDivergence",
        severity="critical",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="Ranks of run {{ $labels.run }} have different weights.",
        description=(
            f"Ranks that answer: {ranks}. Weights that must be equal on all of them are not, and "
            "they will not become equal again. First read which layer and which rank in the log "
            "of rank 0, then stop and go back to the last checkpoint before that step."
        ),
        dashboard="gradwatch-distributed",
    )


def _rank_outlier(thresholds: Thresholds) -> Alert:
    largest = now("max(gradwatch_local_norm{SELF})")
    least = now("min(gradwatch_local_norm{SELF})")
    events = ("rank_outlier",)
    return Alert(
        name="GradwatchRankOutlier",
        severity="warning",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="One rank of run {{ $labels.run }} has gradients unlike the others.",
        description=(
            f"Norms of the ranks' own gradients lie between {least} and {largest}. "
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
            f"Kinds, and layers in each: {_open(VANISHING)}. "
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
            f"Kinds, and layers in each: {_open(UPDATES)}. "
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
    loss = now("max(gradwatch_loss{SELF})")
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
            f"The loss is {loss}. "
            "First see whether the norm rose before it: then it is the optimization (learning "
            "rate, warm-up); a loss that rises alone is the data."
        ),
    )


def _loss_scale(thresholds: Thresholds) -> Alert:
    scale = now("min(gradwatch_loss_scale{SELF})", 'printf "%g"')
    events = ("loss_scale_collapse",)
    return Alert(
        name="GradwatchLossScaleCollapsed",
        severity="warning",
        events=events,
        expr=happened(events, thresholds.event_seconds),
        summary="The loss scale of run {{ $labels.run }} finds no level.",
        description=(
            f"The loss scale is {scale}. Steps are dropped and nothing is learnt in them. "
            "First see whether the loss is finite: then an operation overflows in float16, use "
            "bfloat16 or find it; if it is not, the weights are lost."
        ),
        dashboard="gradwatch-clipping",
    )


def _stuck(thresholds: Thresholds) -> Alert:
    step = now("max(gradwatch_step{SELF})", 'printf "%.0f"')
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


def _open(events: tuple[str, ...]) -> str:
    """Kinds with the number of layers that their open episode covers."""
    layers = f"gradwatch_anomalous_layers{{SELF,{kinds(events)}}}"
    return which(f"max by (event) ({layers}) > 0", "event")


def _found(events: tuple[str, ...], thresholds: Thresholds) -> str:
    total = f"gradwatch_events_total{{SELF,{kinds(events)}}}"
    window = duration(thresholds.window_seconds)
    return which(f"sum by (event) (increase({total}[{window}])) > 0", "event")
