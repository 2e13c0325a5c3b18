"""The third row: which layer misbehaves, and since when."""

from __future__ import annotations

from gradwatch.dashboards.layout import Row, line
from gradwatch.dashboards.panels import Json, heatmap, styled, table, target, timeseries

__all__ = ["DASHBOARD_UID", "layers"]

DASHBOARD_UID = "gradwatch-run"

_LARGEST = "topk(20, max by (run, layer) (gradwatch_grad_norm))"

_AGAINST_LAST_HOUR = f"""max by (run, layer) (gradwatch_grad_norm)
/ max by (run, layer) (avg_over_time(gradwatch_grad_norm[1h]) > 0)
and on (run, layer) {_LARGEST}"""

_COEFS = f"""min by (run, layer) (gradwatch_clip_coef)
and on (run, layer) {_LARGEST}"""

_CHOOSE_LAYER = {
    "title": "Show this layer in depth",
    "url": f"/d/{DASHBOARD_UID}?${{__url_time_range}}&${{datasource:queryparam}}"
    "&${job:queryparam}&${run:queryparam}&${rank:queryparam}&var-layer=${__value.raw}",
}


def layers() -> Row:
    overview = heatmap(
        "Norm of every layer",
        "Decimal logarithm of each layer's norm before clipping: one unit is a factor of ten, "
        "-12 stands for zero. Follow a bright edge to the left: the layer that lights up first "
        "moved first. Choose one run.",
        target("log10(clamp_min(max by (layer) (gradwatch_grad_norm), 1e-12))", "{{layer}}"),
        unit="none",
        cell_unit="none",
        hide_below=-300,
    )
    return Row(
        title="Layers",
        lines=[
            line(12, overview),
            line(10, _largest(), _norm(), _coef(), widths=(10, 7, 7)),
            line(9, _updates(), _update()),
        ],
    )


def _largest() -> Json:
    return table(
        "The 20 largest layers now",
        "Norm before clipping, the same relative to the layer's mean over the last hour, and what "
        "clipping left of it. Click a layer to see it in depth; a ratio above 4 is where an "
        "explosion begins.",
        target(_LARGEST, now=True, form="table"),
        target(_AGAINST_LAST_HOUR, now=True, form="table"),
        target(_COEFS, now=True, form="table"),
        unit="none",
        columns={
            "run": "Run",
            "layer": "Layer",
            "Value #A": "Norm",
            "Value #B": "Times its mean of 1 h",
            "Value #C": "Clip coefficient",
        },
        sort_by="Norm",
        overrides=(
            styled("Layer", links=[_CHOOSE_LAYER]),
            styled("Clip coefficient", unit="percentunit"),
        ),
    )


def _norm() -> Json:
    return timeseries(
        "Norm of $layer",
        "This layer's gradient before clipping, beside the total norm. When both lines touch, "
        "this layer is the total norm: look here first.",
        target('max by (run) (gradwatch_grad_norm{layer="$layer"})', "{{run}} layer"),
        target("max by (run) (gradwatch_total_norm)", "{{run}} total"),
        unit="none",
        log=True,
    )


def _updates() -> Json:
    return heatmap(
        "Update over weights, by layer",
        "Decimal logarithm of the norm of each layer's update over the norm of its weights, from a "
        "sample of its elements in each tenth step. Near -3 is usual; a layer near 0 is rewritten "
        "by single steps, one below -7 stands still. Choose one run.",
        target("log10(clamp_min(max by (layer) (gradwatch_update_ratio), 1e-12))", "{{layer}}"),
        unit="none",
        cell_unit="none",
        hide_below=-300,
    )


def _update() -> Json:
    return timeseries(
        "Update over weights of $layer",
        "How far one step moves this layer: the norm of its update over the norm of its weights, "
        "sampled. Falling with the learning rate is healthy, above 0.3 it forgets what it knew.",
        target('max by (run) (gradwatch_update_ratio{layer="$layer"})', "{{run}}"),
        unit="none",
        log=True,
    )


def _coef() -> Json:
    return timeseries(
        "Clip coefficient of $layer",
        "What clipping left of this layer's gradient, 100 % when it was not touched. Lower than "
        "that of its neighbours: a rule singles this layer out; check its params and limit.",
        target('min by (run) (gradwatch_clip_coef{layer="$layer"})', "{{run}}"),
        unit="percentunit",
        least=0,
        most=1,
    )
