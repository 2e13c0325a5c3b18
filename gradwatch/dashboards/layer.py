"""The layer dashboard: one layer in depth, beside all the others."""

from __future__ import annotations

from gradwatch.dashboards.board import LAYER, board
from gradwatch.dashboards.layers import largest_layers, norm_map, update_map
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import Json, stat, target, thresholds, timeseries

__all__ = ["layer_dashboard"]

_NORM = 'max by (run) (gradwatch_grad_norm{layer="$layer"})'
_USUAL = 'max by (run) (avg_over_time(gradwatch_grad_norm{layer="$layer"}[1h]) > 0)'
_TIMES_USUAL = f"{_NORM}\n/ {_USUAL}"
_SHARE = f"({_NORM}\n/ (max by (run) (gradwatch_total_norm) > 0)) ^ 2"
_RANK = f"""count by (run) (
  gradwatch_grad_norm > on (run) group_left ()
  {_NORM}
)
or 0 * {_NORM}"""

EXPLODING_TIMES = 4.0
"""Where the detector `exploding` begins to look: docs/policy.md, detect.exploding."""

OVERSIZED, STALLED = 0.3, 1e-7
"""Update over weights: docs/policy.md, detect.oversized_update and detect.stalled_update."""


def layer_dashboard(runbook_url: str) -> Json:
    return board(
        LAYER,
        "layer",
        "One layer: what is usual for it, since when it is not, and what clipping leaves of it.",
        [
            Row(title="$layer", lines=[_figures(), _norms(), _steps()]),
            Row(
                title="Among the others",
                lines=[line(12, norm_map()), line(10, largest_layers(), update_map())],
            ),
        ],
        choose=("job", "run", "layer"),
        runbook_url=runbook_url,
    )


def _figures() -> Line:
    return line(
        4,
        stat(
            "Norm",
            "L2 norm of this layer's gradient at the last step, before clipping. NaN: see the "
            "card of the anomaly for what went bad first.",
            _NORM,
            unit="none",
        ),
        stat(
            "Times its mean of 1 h",
            "The norm relative to this layer's own mean over the last hour. Above 4 is where an "
            "explosion begins, far below 1 the layer falls silent.",
            _TIMES_USUAL,
            unit="none",
            steps=thresholds((None, "green"), (EXPLODING_TIMES, "red")),
            decimals=2,
        ),
        stat(
            "Share of the total",
            "Share of this layer in the squared total norm. Near 100 % this layer is the total "
            "norm: clipping by it shrinks all the others with it. Give it a rule of its own.",
            _SHARE,
            unit="percentunit",
            decimals=1,
        ),
        stat(
            "Layers with a larger norm",
            "How many layers have a larger norm now. 0: this is the largest one. See the table "
            "below for those before it.",
            _RANK,
            unit="none",
            decimals=0,
        ),
        stat(
            "Clip coefficient",
            "What clipping left of this layer's gradient at the last step. Lower than in the "
            "panel Steps clipped of the run: a rule singles this layer out.",
            'min by (run) (gradwatch_clip_coef{layer="$layer"})',
            unit="percentunit",
        ),
        stat(
            "Update over weights",
            "How far the last sampled step moved this layer. Near 1e-3 is usual; above 0.3 it "
            "forgets: lower the rate or lengthen the warm-up; below 1e-7 it stands still.",
            'max by (run) (gradwatch_update_ratio{layer="$layer"})',
            unit="sci",
            steps=thresholds((None, "orange"), (STALLED, "green"), (OVERSIZED, "red")),
        ),
    )


def _norms() -> Line:
    return line(
        9,
        timeseries(
            "Norm of $layer",
            "This layer's gradient before clipping, beside the total norm and the median of all "
            "layers. When it touches the total, this layer is the total norm: look here first.",
            target(_NORM, "{{run}} layer"),
            target("max by (run) (gradwatch_total_norm)", "{{run}} total"),
            target("quantile by (run) (0.5, gradwatch_grad_norm)", "{{run}} median layer"),
            unit="none",
            log=True,
        ),
        timeseries(
            "$layer against its own mean of 1 h",
            "1 is what is usual for this layer; the line is where an explosion begins. The first "
            "crossing says since when: compare learning rate and batch there.",
            target(_TIMES_USUAL, "{{run}}"),
            unit="none",
            log=True,
            marks=((EXPLODING_TIMES, "red"),),
        ),
    )


def _steps() -> Line:
    return line(
        8,
        timeseries(
            "Clip coefficient of $layer",
            "What clipping left of this layer's gradient, 100 % when it was not touched. Lower "
            "than that of its neighbours: a rule singles this layer out; check its params and "
            "limit.",
            target('min by (run) (gradwatch_clip_coef{layer="$layer"})', "{{run}}"),
            unit="percentunit",
            least=0,
            most=1,
        ),
        timeseries(
            "Update over weights of $layer",
            "How far one step moves this layer: the norm of its update over the norm of its "
            "weights, sampled. Falling with the learning rate is healthy, above the line it "
            "forgets what it knew.",
            target('max by (run) (gradwatch_update_ratio{layer="$layer"})', "{{run}}"),
            unit="none",
            log=True,
            marks=((OVERSIZED, "red"),),
        ),
        timeseries(
            "Share of $layer in the total",
            "Share of this layer in the squared total norm. A share that grows for hours is a "
            "layer that runs away: look at its weight decay and at the rate of its group.",
            target(_SHARE, "{{run}}"),
            unit="percentunit",
            least=0,
            most=1,
        ),
    )
