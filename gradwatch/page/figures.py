"""Columns in, Bokeh figures out: the same ones live and in the report.

Names of sources and of what a page changes are set here; static/page.js finds them by these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearAxis,
    LinearColorMapper,
    LogTicker,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
)  # fmt: skip
from bokeh.plotting import figure

from gradwatch.page.colours import AFTER, BEFORE, LEVELS, LIMITS, MORE, NONFINITE, THEMES
from gradwatch.page.columns import DEPARTURE, Columns, Heat, short

__all__ = ["Drawn", "compared", "heat_map", "layer_figures", "rank_figure", "run_figures"]

HEIGHT, LOW_HEIGHT = 300, 200
MARKERS = {"alert": "triangle", "warning": "diamond", "event": "circle"}
MARK_SIZES = {"alert": 13, "warning": 10, "event": 6}
MOST_TICKS = 300
MARGINS = (110, 96)
"""Pixels at the left and at the right of every figure, so that steps stand above each other."""

DASHES = ("dashed", "dotted", "dotdash", "dashdot")


@dataclass(frozen=True)
class Drawn:
    """One figure with the words that stand beside it."""

    name: str
    title: str
    explanation: str
    model: Any


def run_figures(
    columns: Mapping[str, Columns],
    heat: Heat,
    layers: Sequence[str],
    rules: Sequence[str],
    steps: tuple[float, float],
) -> list[Drawn]:
    """All of one run, over one range of steps that they share.

    Args:
        columns: of `run_columns`.
        steps: the first and the last one that are shown.
    """
    shared = steps_range(*steps)
    sources = _sources(columns)
    return [
        norm_figure(sources, rules, shared),
        heat_map(sources["heat"], heat, layers, shared),
        clip_figure(sources, shared),
        loss_figure(sources, shared),
        settings_figure(sources, shared),
        noise_figure(sources, shared),
    ]


def norm_figure(
    sources: Mapping[str, ColumnDataSource], rules: Sequence[str], steps: Range1d
) -> Drawn:
    plot = _plot("total norm", steps, "L2 norm of the gradient", log=True, height=HEIGHT)
    source = sources["norm"]
    _nonfinite(plot, sources["nonfinite"])
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
    _hover(plot, [line], [("before", "@before{0.000e}"), ("after", "@after{0.000e}")])
    _legend(plot)
    return Drawn(
        "norm",
        "Total norm",
        "The whole gradient as one vector, in each step before and after clipping, with the limit "
        "in force. Logarithmic. Each column shows its largest step. Triangles are alerts, diamonds "
        "warnings, dots one-step events; a pink bar is a norm that is not finite.",
        plot,
    )


def heat_map(source: ColumnDataSource, heat: Heat, layers: Sequence[str], steps: Range1d) -> Drawn:
    rows = max(len(layers), 1)
    height = min(max(140 + 16 * rows, 220), 560)
    plot = _plot("layers", steps, "", log=False, height=height)
    plot.y_range = Range1d(start=rows - 0.5, end=-0.5, bounds=(-0.5, rows - 0.5), name="layer rows")
    plot.yaxis.ticker = (
        FixedTicker(ticks=list(range(rows)))
        if rows <= 28
        else BasicTicker(desired_num_ticks=20, min_interval=1, num_minor_ticks=0)
    )
    plot.yaxis.major_label_overrides = {i: short(name) for i, name in enumerate(layers)}
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
        f"finite.{together} A click opens the layer.",
        plot,
    )


def clip_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["clip"]
    plot = _plot("clipping", steps, "multiplier", log=False, height=LOW_HEIGHT)
    plot.y_range = Range1d(start=-0.03, end=1.05)
    _second_axis(plot, "share", "% of steps", Range1d(start=-3, end=105))
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
    _hover(plot, [line], said)
    _legend(plot)
    return Drawn(
        "clip",
        "Clipping",
        "Norm after clipping over norm before: 1 is untouched. Each column shows its least "
        "multiplier, and how many of its steps were clipped and skipped.",
        plot,
    )


def loss_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["training"]
    plot = _plot("loss", steps, "loss", log=False, height=LOW_HEIGHT)
    _nonfinite(plot, sources["bad loss"])
    line = plot.line("x", "loss", source=source, color=BEFORE, line_width=1.5)
    _hover(plot, [line], [("loss", "@loss{0.0000}")])
    return Drawn(
        "loss",
        "Loss",
        "As it was logged with watch.log(loss=...), the largest of each column. A pink bar is a "
        "loss that is not finite.",
        plot,
    )


def settings_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["training"]
    plot = _plot("settings", steps, "value", log=True, height=LOW_HEIGHT)
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
    _hover(plot, lines, said)
    _legend(plot)
    return Drawn(
        "settings",
        "Learning rate and loss scale",
        "Of the first group of the optimizer, and of the scaler where there is one, the least of "
        "each column. Logarithmic.",
        plot,
    )


def noise_figure(sources: Mapping[str, ColumnDataSource], steps: Range1d) -> Drawn:
    source = sources["noise"]
    plot = _plot("noise", steps, "micro-batches", log=True, height=LOW_HEIGHT)
    line = plot.line(
        "x", "noise_scale", source=source, color=BEFORE, line_width=1.5,
        legend_label="gradient noise scale",
    )  # fmt: skip
    used = plot.line(
        "x", "micro_batches", source=source, color=AFTER, line_width=1.5,
        legend_label="accumulated in a step",
    )  # fmt: skip
    said = [("noise scale", "@noise_scale{0.0}"), ("accumulated", "@micro_batches{0}")]
    _hover(plot, [line, used], said)
    _legend(plot)
    return Drawn(
        "noise",
        "Noise scale and accumulation",
        "The batch size at which noise and signal are equal, against the micro-batches of a step. "
        "Far below the noise scale more accumulation makes better steps; far above it, it is "
        "waste. Known only where a step has two micro-batches or more.",
        plot,
    )


def rank_figure(columns: Mapping[str, Columns], steps: tuple[float, float]) -> Drawn:
    plot = _plot("ranks", steps_range(*steps), "seconds a step", log=True, height=HEIGHT)
    lines = [
        plot.line(
            "x", "seconds", source=ColumnDataSource(data=data, name=name), line_width=1.5,
            color=MORE[i % len(MORE)], line_dash=("solid", *DASHES)[i // len(MORE) % 5],
            legend_label=name,
        )
        for i, (name, data) in enumerate(columns.items())
    ]  # fmt: skip
    _hover(plot, lines[:1], [("seconds", "@seconds{0.000}")])
    _legend(plot)
    return Drawn(
        "ranks",
        "Ranks",
        "How long a step takes on each rank, the longest of each column, logarithmic. A rank that "
        "lies above the others keeps them waiting.",
        plot,
    )


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
    sources = _sources(columns)
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
    plot = _plot("layer norm", steps, "L2 norm of the gradient", log=True, height=HEIGHT)
    source = sources["layer norm"]
    _nonfinite(plot, sources["nonfinite"])
    colours = iter(MORE[1:])
    for k, name in enumerate(neighbours):
        mine = name == layer
        line = plot.line(
            "x", f"norm {k}", source=source, line_width=2.0 if mine else 1.0,
            color=BEFORE if mine else next(colours), line_alpha=1.0 if mine else 0.55,
            legend_label=short(name),
        )  # fmt: skip
        if mine:
            _hover(plot, [line], [("norm", f"@{{norm {k}}}{{0.000e}}")])
    _legend(plot)
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
    plot = _plot(name, steps, axis, log=log, height=LOW_HEIGHT)
    drawn = [
        plot.line("x", column, source=sources[name], color=BEFORE, line_width=1.5)
        for column in lines
    ]
    if name == "update":
        drawn.append(plot.scatter("x", "ratio", source=sources[name], color=BEFORE, size=3))
    shown = [(label, f"@{column}{{0.000e}}") for column, label in lines.items()]
    _hover(plot, drawn[:1], shown)
    return Drawn(name, title, explanation, plot)


def compared(runs: Mapping[str, Mapping[str, Columns]], steps: tuple[float, float]) -> list[Drawn]:
    """Several runs over each other, by the name that is shown."""
    shared = steps_range(*steps)
    wanted = (
        ("total norm", "norm", "before", "L2 norm of the gradient", True,
         "The whole gradient before clipping, the largest step of each column. Logarithmic."),
        ("loss", "training", "loss", "loss", False, "The loss as it was logged."),
        ("clip multiplier", "clip", "coef", "multiplier", False,
         "Norm after clipping over norm before, the least of each column."),
        ("learning rate", "training", "learning_rate", "learning rate", True, "Logarithmic."),
    )  # fmt: skip
    found = []
    for title, source, column, axis, log, explanation in wanted:
        plot = _plot(title, shared, axis, log=log, height=260)
        for i, (name, columns) in enumerate(runs.items()):
            data = {"x": columns[source]["x"], "y": columns[source][column]}
            plot.line(
                "x", "y", source=ColumnDataSource(data=data, name=f"{title} {i}"),
                color=MORE[i % len(MORE)], line_width=1.5, legend_label=short(name, 60),
                line_dash=("solid", *DASHES)[i % 5],
            )  # fmt: skip
        _hover(plot, list(plot.renderers), [("value", "@y{0.000e}")])
        _legend(plot)
        found.append(Drawn(title, title.capitalize(), explanation, plot))
    return found


def steps_range(start: float, end: float) -> Range1d:
    """What all figures of a page share; a run of one step has some width too."""
    return Range1d(start=start, end=max(end, start + 1), name="steps")


def _sources(columns: Mapping[str, Columns]) -> dict[str, ColumnDataSource]:
    return {name: ColumnDataSource(data=data, name=name) for name, data in columns.items()}


def _plot(name: str, steps: Range1d, axis: str, *, log: bool, height: int) -> Any:
    plot = figure(
        name=f"figure {name}", height=height, sizing_mode="stretch_width", x_range=steps,
        y_axis_type="log" if log else "linear", x_axis_label="step", y_axis_label=axis,
        tools="xpan,xbox_zoom,xwheel_zoom,xzoom_in,xzoom_out,reset,save",
        active_drag="xbox_zoom", active_scroll=None, toolbar_location="above",
        min_border_left=MARGINS[0], min_border_right=MARGINS[1], lod_threshold=None,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    if log:
        plot.yaxis.ticker = LogTicker(desired_num_ticks=5)
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    plot.xgrid.visible = False
    return plot


def _second_axis(plot: Any, name: str, label: str, values: Range1d) -> None:
    plot.extra_y_ranges[name] = values
    plot.add_layout(LinearAxis(y_range_name=name, axis_label=label), "right")


def _nonfinite(plot: Any, source: ColumnDataSource) -> None:
    plot.vspan(x="x", source=source, line_color=NONFINITE, line_width=3, line_alpha=0.6)


def _hover(plot: Any, renderers: Sequence[Any], shown: Sequence[tuple[str, str]]) -> None:
    plot.add_tools(
        HoverTool(
            renderers=list(renderers), mode="vline", tooltips=[("step", "@x{0,0}"), *shown],
            line_policy="nearest",
        )
    )  # fmt: skip


def _legend(plot: Any) -> None:
    if not plot.legend:
        return
    plot.legend.orientation = "horizontal"
    plot.legend.location = "top_left"
    plot.legend.click_policy = "hide"
    plot.legend.background_fill_alpha = 0.6
    plot.legend.border_line_color = None
    plot.legend.label_text_font_size = "11px"
    plot.legend.padding = 2
    plot.legend.margin = 2
    plot.add_layout(plot.legend[0], "above")
