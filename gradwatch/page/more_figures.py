"""Columns in, figures out: of one layer, of several runs, of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from bokeh.models import ColumnDataSource, Range1d

from gradwatch.page.colours import BEFORE, MORE
from gradwatch.page.columns import Columns, short, spans_decades
from gradwatch.page.plots import (
    DASHES,
    HEIGHT,
    LOW_HEIGHT,
    Drawn,
    hover,
    legend,
    nonfinite_bars,
    plot_of,
    sources_of,
    steps_range,
)

__all__ = ["RANKS", "compared", "layer_figures", "rank_figure"]


RANKS = {
    "duration_seconds": (
        "Ranks", "seconds a step",
        "How long a step takes on each rank, the longest of each column, logarithmic. A rank that "
        "lies above the others keeps them waiting.",
    ),
    "local_norm": (
        "Own gradients", "own norm",
        "The norm of each rank's own gradient before it is averaged with the others, as sampled, "
        "logarithmic. A rank that goes its own way has other data, another seed or bad hardware.",
    ),
}  # fmt: skip
"""By the number that is compared: heading, axis, explanation."""


def rank_figure(what: str, columns: Mapping[str, Columns], steps: tuple[float, float]) -> Drawn:
    heading, axis, said = RANKS[what]
    plot = plot_of(f"ranks-{what}", steps_range(*steps), axis, log=True, height=HEIGHT)
    lines = [
        plot.line(
            "x", "value", source=ColumnDataSource(data=data, name=name), line_width=1.5,
            color=MORE[i % len(MORE)], line_dash=("solid", *DASHES)[i // len(MORE) % 5],
            legend_label=name,
        )
        for i, (name, data) in enumerate(columns.items())
    ]  # fmt: skip
    hover(plot, lines[:1], [(axis, "@value{0.000}")])
    legend(plot)
    return Drawn(f"ranks-{what}", heading, said, plot)


def layer_figures(
    columns: Mapping[str, Columns],
    layer: str,
    neighbours: Sequence[str],
    steps: tuple[float, float],
) -> list[Drawn]:
    """One layer in depth.

    Args:
        columns: of `layer_columns`.
        neighbours: in the order of the model, the layer among them.
    """
    shared = steps_range(*steps)
    sources = sources_of(columns)
    return [
        _neighbours(sources, layer, neighbours, shared),
        _lines(
            sources, "z", "Departure (z)", "z of ln(norm)", shared, False, {"z": "z"},
            "How far the logarithm of the norm lies from its median over the 128 steps before, in "
            "units of their spread (1.4826 MAD, at least 0.25). Detectors begin to look at 6.",
        ),
        _lines(
            sources, "coef", "Multiplier", "multiplier", shared, False, {"coef": "multiplier"},
            "What clipping left of this layer's gradient: norm after over norm before. Each column "
            "shows its least.",
        ),
        _lines(
            sources, "update", "Update ratio", "update / weights", shared, True,
            {"ratio": "update ratio"},
            "Size of the update over the size of the weights, sampled. About 1e-3 is common; below "
            "1e-7 a layer stands still, above 0.3 it is thrown about.",
        ),
    ]  # fmt: skip


def _neighbours(
    sources: Mapping[str, ColumnDataSource], layer: str, neighbours: Sequence[str], steps: Range1d
) -> Drawn:
    plot = plot_of("layer norm", steps, "L2 norm of the gradient", log=True, height=HEIGHT)
    source = sources["layer norm"]
    nonfinite_bars(plot, sources["nonfinite"])
    colours = iter(MORE[1:])
    for k, name in enumerate(neighbours):
        mine = name == layer
        line = plot.line(
            "x", f"norm {k}", source=source, line_width=2.0 if mine else 1.0,
            color=BEFORE if mine else next(colours), line_alpha=1.0 if mine else 0.55,
            legend_label=short(name),
        )  # fmt: skip
        if mine:
            hover(plot, [line], [("norm", f"@{{norm {k}}}{{0.000e}}")])
    legend(plot)
    return Drawn(
        "layer norm",
        "Gradient norm",
        "Of this layer and its neighbours in the model, before clipping, logarithmic. Each column "
        "shows its largest step; a pink bar is a norm of this layer that is not finite.",
        plot,
    )


def _lines(
    sources: Mapping[str, ColumnDataSource], name: str, title: str, axis: str, steps: Range1d,
    log: bool, lines: Mapping[str, str], explanation: str,
) -> Drawn:  # fmt: skip
    plot = plot_of(name, steps, axis, log=log, height=LOW_HEIGHT)
    drawn = [
        plot.line("x", column, source=sources[name], color=BEFORE, line_width=1.5)
        for column in lines
    ]
    if name == "update":
        drawn.append(plot.scatter("x", "ratio", source=sources[name], color=BEFORE, size=3))
    shown = [(label, f"@{column}{{0.000e}}") for column, label in lines.items()]
    hover(plot, drawn[:1], shown)
    return Drawn(name, title, explanation, plot)


def compared(runs: Mapping[str, Mapping[str, Columns]], steps: tuple[float, float]) -> list[Drawn]:
    """Several runs over each other, by the name that is shown."""
    shared = steps_range(*steps)
    losses = [np.asarray(columns["training"]["loss"]) for columns in runs.values()]
    log_loss = spans_decades(np.concatenate(losses))
    wanted = (
        ("total norm", "norm", "before", "L2 norm of the gradient", True,
         "The whole gradient before clipping, the largest step of each column. Logarithmic."),
        ("loss", "training", "loss", "loss", log_loss,
         f"The loss as it was logged.{' Logarithmic.' if log_loss else ''}"),
        ("clip multiplier", "clip", "coef", "multiplier", False,
         "Norm after clipping over norm before, the least of each column."),
        ("learning rate", "training", "learning_rate", "learning rate", True, "Logarithmic."),
    )  # fmt: skip
    found = []
    for title, source, column, axis, log, explanation in wanted:
        plot = plot_of(title, shared, axis, log=log, height=260)
        for i, (name, columns) in enumerate(runs.items()):
            data = {"x": columns[source]["x"], "y": columns[source][column]}
            plot.line(
                "x", "y", source=ColumnDataSource(data=data, name=f"{title} {i}"),
                color=MORE[i % len(MORE)], line_width=1.5, legend_label=short(name, 60),
                line_dash=("solid", *DASHES)[i % 5],
            )  # fmt: skip
        hover(plot, list(plot.renderers), [("value", "@y{0.000e}")])
        legend(plot)
        found.append(Drawn(title, title.capitalize(), explanation, plot))
    return found
