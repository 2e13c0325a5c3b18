"""The third row: which layer misbehaves, and since when."""

from __future__ import annotations

from gradwatch.dashboards.board import LAYER, link_to
from gradwatch.dashboards.layout import Row, line
from gradwatch.dashboards.panels import Json, heatmap, styled, table, target

__all__ = ["largest_layers", "layers", "norm_map", "update_map"]

_LARGEST = "topk(20, max by (run, layer) (gradwatch_grad_norm))"

_AGAINST_LAST_HOUR = f"""max by (run, layer) (gradwatch_grad_norm)
/ max by (run, layer) (avg_over_time(gradwatch_grad_norm[1h]) > 0)
and on (run, layer) {_LARGEST}"""

_COEFS = f"""min by (run, layer) (gradwatch_clip_coef)
and on (run, layer) {_LARGEST}"""


def layers() -> Row:
    return Row(
        title="Layers", lines=[line(12, norm_map()), line(10, largest_layers(), update_map())]
    )


def norm_map() -> Json:
    return heatmap(
        "Norm of every layer",
        "Decimal logarithm of each layer's norm before clipping: one unit is a factor of ten, "
        "-12 stands for zero. Follow a bright edge to the left: the layer that lights up first "
        "moved first. Choose one run.",
        target("log10(clamp_min(max by (layer) (gradwatch_grad_norm), 1e-12))", "{{layer}}"),
        unit="none",
        cell_unit="none",
        hide_below=-300,
    )


def largest_layers() -> Json:
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
            styled(
                "Layer",
                links=[link_to(LAYER, "Show this layer in depth", run="Run", layer="Layer")],
            ),
            styled("Clip coefficient", unit="percentunit"),
        ),
    )


def update_map() -> Json:
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
