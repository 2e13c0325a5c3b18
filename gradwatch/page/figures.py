"""Columns in, Bokeh figures out: the same ones live and in the report.

Names of sources and of what a page changes are set here; static/page.js finds them by these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    LinearColorMapper,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar

from gradwatch.page.colours import AFTER, BEFORE, LEVELS, LIMITS, NONFINITE, THEMES
from gradwatch.page.columns import DEPARTURE, Columns, Heat, short
from gradwatch.page.grid import LEARNING
from gradwatch.page.plots import (
    DASHES,
    HEIGHT,
    LOW_HEIGHT,
    Drawn,
    alert_lines,
    hover,
    legend,
    nonfinite_bars,
    plot_of,
    second_axis,
    sources_of,
    steps_range,
)

__all__ = ["heat_map", "run_figures"]

ALWAYS = ("norm", "heat", "clip")
MARKERS = {"alert": "triangle", "warning": "diamond", "event": "circle"}
MOST_LABELS, LABEL_LENGTH = 28, 19
MARK_SIZES = {"alert": 13, "warning": 10, "event": 6}


def run_figures(
    columns: Mapping[str, Columns],
    heat: Heat,
    layers: Sequence[str],
    rules: Sequence[str],
    steps: tuple[float, float],
    told_of: Sequence[str] = ("loss", "changing settings", "noise"),
) -> list[Drawn]:
    """All of one run, over one range of steps that they share; first what a verdict speaks of.

    Args:
        columns: of `run_columns`.
        steps: the first and the last one that are shown.
        told_of: of the figures that not every run has, those that this one has.
    """
    shared = steps_range(*steps)
    sources = sources_of(columns)
    drawn: dict[str, Callable[[], Drawn]] = {
        "norm": lambda: norm_figure(sources, rules, shared),
        "loss": lambda: loss_figure(sources, shared, log=False),
        "log loss": lambda: loss_figure(sources, shared, log=True),
        "changing settings": lambda: settings_figure(sources, shared),
        "heat": lambda: heat_map(sources, heat, layers, shared),
        "clip": lambda: clip_figure(sources, shared),
        "settings": lambda: settings_figure(sources, shared),
        "noise": lambda: noise_figure(sources, shared),
    }
    return [make() for name, make in drawn.items() if name in ALWAYS or name in told_of]


def norm_figure(
    sources: Mapping[str, ColumnDataSource], rules: Sequence[str], steps: Range1d
) -> Drawn:
    plot = plot_of("total norm", steps, "L2 norm of the gradient", log=True, height=HEIGHT)
    source = sources["norm"]
    nonfinite_bars(plot, sources["nonfinite"])
    line = plot.line(
        "x", "before", source=source, color=BEFORE, line_width=1.5, legend_label="before clipping"
    )
    plot.line(
        "x", "after", source=source, color=AFTER, line_width=1.5, legend_label="after clipping"
    )
    for k, rule in enumerate(rules):
        plot.line(
            "x", f"limit {k}", source=source, color=LIMITS, line_width=1.5,
            line_dash=DASHES[k % len(DASHES)], legend_label=f"limit {short(rule)}",
        )  # fmt: skip
    for level, marker in MARKERS.items():
        plot.scatter(
            "x", "y", source=sources[level], marker=marker, size=MARK_SIZES[level],
            fill_color=LEVELS[level], line_color=LEVELS[level], fill_alpha=0.75,
            legend_label=level, name=f"marks {level}",
        )  # fmt: skip
    hover(plot, [line], [("before", "@before{0.000e}"), ("after", "@after{0.000e}")])
    legend(plot)
    return Drawn(
        "norm",
        "Total norm",
        "The whole gradient as one vector, in each step before and after clipping, with the limit "
        "in force. Logarithmic. Each column shows its largest step. Triangles are alerts, diamonds "
        "warnings, dots one-step events; a pink bar is a norm that is not finite.",
        plot,
    )


def heat_map(
    sources: Mapping[str, ColumnDataSource], heat: Heat, layers: Sequence[str], steps: Range1d
) -> Drawn:
    source, rows = sources["heat"], max(len(layers), 1)
    height = min(max(140 + 16 * rows, 220), 560)
    plot = plot_of("layers", steps, "", log=False, height=height)
    plot.y_range = Range1d(start=rows - 0.5, end=-0.5, bounds=(-0.5, rows - 0.5), name="layer rows")
    # Only what is labelled: Bokeh takes a millisecond for each label.
    labelled = range(0, rows, -(-rows // MOST_LABELS))
    plot.yaxis.ticker = FixedTicker(ticks=list(labelled))
    plot.yaxis.major_label_overrides = {
        i: short(layers[i], LABEL_LENGTH) for i in labelled if i < len(layers)
    }
    plot.grid.visible = False
    bounds = {"departure": (-DEPARTURE, DEPARTURE), "absolute": (heat.low, heat.high)}
    titles = {"departure": "times usual", "absolute": "norm"}
    ticks: dict[str, Any] = {
        "departure": {
            "ticker": FixedTicker(ticks=[-1, 0, 1]),
            "major_label_overrides": {-1: "1/10", 0: "1", 1: "10"},
        },
        "absolute": {"formatter": PrintfTickFormatter(format="10^%.1f")},
    }
    for kind, (low, high) in bounds.items():
        mapper = LinearColorMapper(
            palette=THEMES["light"][kind], low=low - 1e-3, high=high, nan_color=NONFINITE,
            low_color="#00000000", name=f"colours {kind}",
        )  # fmt: skip
        shown = kind == "departure"
        plot.image(
            kind, source=source, x="x", y="y", dw="dw", dh="dh", color_mapper=mapper,
            name=f"picture {kind}", visible=shown,
        )  # fmt: skip
        plot.add_layout(
            ColorBar(
                color_mapper=mapper, title=titles[kind], width=10, visible=shown, padding=4,
                name=f"bar {kind}", **ticks[kind],
            ),
            "right",
        )  # fmt: skip
    plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=sources["learning"],
        line_color=None, fill_color=LIMITS, fill_alpha=0.1, hatch_pattern="right_diagonal_line",
        hatch_color=LIMITS, hatch_alpha=0.35, hatch_scale=10.0, hatch_weight=1.0,
        name="learning picture departure",
    )  # fmt: skip
    plot.toolbar.autohide = True
    together = (
        f" {heat.layers_a_row} neighbouring layers share a row, which shows the largest of them."
        if heat.layers_a_row > 1
        else ""
    )
    return Drawn(
        "heat",
        "Layers",
        "The gradient norm of each layer before clipping, the first layer on top. As a departure: "
        "how many times what is usual for that layer, so that an odd layer "
        "stands out of large ones; or as it is. Each column shows its largest step. Pink is not "
        f"finite. Hatched are the first {LEARNING} steps of the run, in which what is usual is "
        f"learnt: there only what is 100 times as large, or as small, has a colour.{together}",
        plot,
    )


def clip_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["clip"]
    plot = plot_of("clipping", steps, "multiplier", log=False, height=LOW_HEIGHT)
    plot.y_range = Range1d(start=-0.03, end=1.05)
    second_axis(plot, "share", "% of steps", Range1d(start=-3, end=105))
    line = plot.line(
        "x", "coef", source=source, color=BEFORE, line_width=1.5, legend_label="least multiplier"
    )
    for name, colour in (("clipped", AFTER), ("skipped", NONFINITE)):
        plot.line(
            "x", name, source=source, color=colour, line_width=1.2, y_range_name="share",
            legend_label=f"{name}, %",
        )  # fmt: skip
    said = [("multiplier", "@coef{0.0000}"), ("clipped", "@clipped{0}%"),
            ("skipped", "@skipped{0}%")]  # fmt: skip
    hover(plot, [line], said)
    legend(plot)
    return Drawn(
        "clip",
        "Clipping",
        "Norm after clipping over norm before: 1 is untouched. Each column shows its least "
        "multiplier, and how many of its steps were clipped and skipped; in shadow mode, would "
        "have been.",
        plot,
    )


def loss_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d, *, log: bool) -> Drawn:
    source = sources["training"]
    plot = plot_of("loss", steps, "loss", log=log, height=LOW_HEIGHT)
    nonfinite_bars(plot, sources["bad loss"])
    alert_lines(plot, sources["alert"])
    line = plot.line("x", "loss", source=source, color=BEFORE, line_width=1.5)
    hover(plot, [line], [("loss", "@loss{0.0000}")])
    return Drawn(
        "loss",
        "Loss",
        "As it was logged with watch.log(loss=...), the largest of each column. "
        f"{'Logarithmic. ' if log else ''}A pink bar is a loss that is not finite; a dotted line "
        "is an alert.",
        plot,
    )


def settings_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["training"]
    plot = plot_of("settings", steps, "value", log=True, height=LOW_HEIGHT)
    alert_lines(plot, sources["alert"])
    lines = [
        plot.line(
            "x", name, source=source, color=colour, line_width=1.5, line_dash=dash,
            legend_label=name.replace("_", " "),
        )
        for name, colour, dash in (
            ("learning_rate", BEFORE, "solid"), ("loss_scale", AFTER, "dashed")
        )
    ]  # fmt: skip
    said = [("learning rate", "@learning_rate{0.00e}"), ("loss scale", "@loss_scale{0}")]
    hover(plot, lines, said)
    legend(plot)
    return Drawn(
        "settings",
        "Learning rate and loss scale",
        "Of the first group of the optimizer, and of the scaler where there is one, the largest "
        "learning rate and the least scale of each column. Logarithmic; a dotted line is an alert.",
        plot,
    )


def noise_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["noise"]
    plot = plot_of("noise", steps, "micro-batches", log=True, height=LOW_HEIGHT)
    line = plot.line(
        "x", "noise_scale", source=source, color=BEFORE, line_width=1.5,
        legend_label="gradient noise scale",
    )  # fmt: skip
    used = plot.line(
        "x", "micro_batches", source=source, color=AFTER, line_width=1.5,
        legend_label="accumulated in a step",
    )  # fmt: skip
    said = [("noise scale", "@noise_scale{0.0}"), ("accumulated", "@micro_batches{0}")]
    hover(plot, [line, used], said)
    legend(plot)
    return Drawn(
        "noise",
        "Noise scale and accumulation",
        "The batch size at which noise and signal are equal, against the micro-batches of a step. "
        "Far below the noise scale more accumulation makes better steps; far above it, it is "
        "waste. Known only where a step has two micro-batches or more.",
        plot,
    )
