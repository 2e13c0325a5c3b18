"""The second row: how the norm, the loss and the policy's decisions developed."""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.layout import Row, line
from gradwatch.dashboards.panels import Json, heatmap, styled, target, timeseries

__all__ = [
    "accumulation",
    "clipped",
    "loss_scale",
    "noise_scale",
    "pace",
    "skipped",
    "spread",
    "total_norm",
    "trend",
]

_DASHED = {"dash": [8, 6], "fill": "dash"}

_CLIPPED_SHARE = """sum by (run, rule) (rate(gradwatch_clipped_steps_total[$__rate_interval]))
/ on (run) group_left ()
sum by (run) (rate(gradwatch_steps_total[$__rate_interval]) > 0)"""


def trend() -> Row:
    return Row(
        title="Trend",
        lines=[
            line(9, total_norm(), spread(), widths=(16, 8)),
            line(7, _loss(), _learning_rate(), _largest_episode()),
            line(7, clipped(), skipped(), _anomalies()),
            line(6, pace(), accumulation()),
        ],
    )


def total_norm() -> Json:
    return timeseries(
        "Total norm",
        "L2 norm of the whole gradient before and after clipping, the largest of the last minute "
        "(which a one-step spike cannot escape), and the limit in force of each rule. A rule per "
        "layer has a limit per layer: compare that one in the layer's dashboard. If before and "
        "after part for long, lower the learning rate or raise the limit.",
        target("max by (run) (gradwatch_total_norm)", "{{run}} before clipping"),
        target("max by (run) (gradwatch_total_norm_clipped)", "{{run}} after clipping"),
        target("max by (run) (gradwatch_total_norm_window_max)", "{{run}} largest in 60 s"),
        target("max by (run, rule) (gradwatch_limit)", "{{run}} limit {{rule}}"),
        unit="none",
        log=True,
        overrides=(
            styled("/largest in 60 s$/", regex=True, custom__lineStyle=_DASHED),
            styled(
                "/ limit /",
                regex=True,
                color={"fixedColor": "red", "mode": "fixed"},
                custom__lineInterpolation="stepAfter",
                custom__lineStyle=_DASHED,
                custom__lineWidth=2,
            ),
        ),
    )


def spread() -> Json:
    return heatmap(
        "Total norm, every step",
        "How many steps had which norm before clipping; no step is left out between two scrapes. "
        "A second band far above the first is a kind of batch: find its steps in the recording.",
        target(
            "sum by (le) (increase(gradwatch_total_norm_distribution_bucket[$__rate_interval]))",
            "{{le}}",
            form="heatmap",
            exemplars=True,
        ),
        unit="none",
    )


def _loss() -> Json:
    return timeseries(
        "Loss",
        "Last loss given to watch.log. Read it under the norm: a norm that rises before the "
        "loss does is the early warning, a loss that jumps alone is the data.",
        target("max by (run) (gradwatch_loss)", "{{run}}"),
        unit="none",
    )


def _learning_rate() -> Json:
    return timeseries(
        "Learning rate",
        "Learning rate of the first parameter group. An explosion within a few steps of a "
        "change here asks for a longer warm-up or a lower peak.",
        target("max by (run) (gradwatch_learning_rate)", "{{run}}"),
        unit="none",
    )


def _largest_episode() -> Json:
    return timeseries(
        "Layers in an open episode",
        "Layers that the open episode of each kind covers. One or two: look at that layer. "
        "All at once: look at the batch, the loss or the learning rate.",
        target("max by (run, event) (gradwatch_anomalous_layers)", "{{run}} {{event}}"),
        unit="none",
        least=0,
    )


def loss_scale() -> Json:
    return timeseries(
        "Loss scale",
        "Loss scale of mixed precision; empty without one. One that keeps falling means "
        "overflow at every step: use bfloat16, or find the layer that overflows.",
        target("max by (run) (gradwatch_loss_scale)", "{{run}}"),
        unit="none",
        log=True,
    )


def noise_scale() -> Json:
    return timeseries(
        "Noise scale",
        "Batch size at which noise and signal of the gradient are equal, in micro-batches (or "
        "the unit of the weights given with the loss), beside the micro-batches of a step. Far "
        "above it, more accumulation costs time and buys little; far below, it is cheap.",
        target("max by (run) (gradwatch_noise_scale)", "{{run}} noise scale"),
        target("max by (run) (gradwatch_accumulation_steps)", "{{run}} micro-batches"),
        unit="none",
        log=True,
    )


def clipped() -> Json:
    return timeseries(
        "Steps clipped, by rule",
        "Share of steps that each rule changed. Occasional is what clipping is for; above "
        "the line for long, the limit is the learning rate in disguise.",
        target(_CLIPPED_SHARE, "{{run}} {{rule}}"),
        unit="percentunit",
        least=0,
        most=1,
        marks=((THRESHOLDS.clipped_share, "orange"),),
    )


def skipped() -> Json:
    return timeseries(
        "Steps skipped, by reason",
        "Steps whose gradients were dropped, and why. Skipped steps shrink the data the model "
        "sees: above a few percent, treat the reason rather than the symptom. In shadow mode, "
        "those that the policy would have dropped.",
        target(
            "max by (run, reason) (increase(gradwatch_skipped_steps_total[$__rate_interval]))",
            "{{run}} {{reason}}",
        ),
        unit="none",
        bars=True,
        least=0,
    )


def _anomalies() -> Json:
    return timeseries(
        "Anomalies, by kind",
        "What the detectors found. An event is one step and pages nobody, an alert is an "
        "episode. Many spikes before an explosion: look at the data of those steps.",
        target(
            "sum by (run, event, level) (increase(gradwatch_events_total[$__rate_interval]))",
            "{{run}} {{event}} ({{level}})",
        ),
        unit="none",
        bars=True,
        least=0,
    )


def pace() -> Json:
    return timeseries(
        "Pace",
        "Optimizer steps and forward-backward passes per second. When both fall together "
        "the machine is slow; when only steps fall, accumulation grew.",
        target("max by (run) (rate(gradwatch_steps_total[$__rate_interval]))", "{{run}} steps"),
        target(
            "max by (run) (rate(gradwatch_micro_batches_total[$__rate_interval]))",
            "{{run}} micro-batches",
        ),
        unit="cps",
        least=0,
    )


def accumulation() -> Json:
    return timeseries(
        "Micro-batches per step",
        "Micro-batches in the last optimizer step. A change also changes the norm: set it "
        "beside the total norm before you blame the model.",
        target("max by (run) (gradwatch_accumulation_steps)", "{{run}}"),
        unit="none",
        least=0,
    )
