"""What every figure has: axes, margins, a legend above, what is said where the mouse is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    HoverTool,
    LinearAxis,
    LogTicker,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from gradwatch.page.colours import LEVELS, NONFINITE
from gradwatch.page.columns import Columns

__all__ = [
    "DASHES",
    "HEIGHT",
    "LOW_HEIGHT",
    "Drawn",
    "alert_lines",
    "hover",
    "legend",
    "nonfinite_bars",
    "plot_of",
    "second_axis",
    "sources_of",
    "steps_range",
]

HEIGHT, LOW_HEIGHT = 280, 180
MARGINS = (140, 96)
"""Pixels at the left and at the right of every figure, so that steps stand above each other."""

DASHES = ("dashed", "dotted", "dotdash", "dashdot")


@dataclass(frozen=True)
class Drawn:
    """One figure with the words that stand beside it."""

    name: str
    title: str
    explanation: str
    model: Any


def steps_range(start: float, end: float) -> Range1d:
    """What all figures of a page share; a run of one step has some width too."""
    return Range1d(start=start, end=max(end, start + 1), name="steps")


def sources_of(columns: Mapping[str, Columns]) -> dict[str, ColumnDataSource]:
    return {name: ColumnDataSource(data=data, name=name) for name, data in columns.items()}


def plot_of(name: str, steps: Range1d, axis: str, *, log: bool, height: int) -> Any:
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


def second_axis(plot: Any, name: str, label: str, values: Range1d) -> None:
    plot.extra_y_ranges[name] = values
    plot.add_layout(LinearAxis(y_range_name=name, axis_label=label), "right")


def nonfinite_bars(plot: Any, source: ColumnDataSource) -> None:
    plot.vspan(x="x", source=source, line_color=NONFINITE, line_width=3, line_alpha=0.6)


def alert_lines(plot: Any, source: ColumnDataSource) -> None:
    plot.vspan(
        x="x", source=source, line_color=LEVELS["alert"], line_width=1.2, line_dash="dotted",
        line_alpha=0.8,
    )  # fmt: skip


def hover(plot: Any, renderers: Sequence[Any], shown: Sequence[tuple[str, str]]) -> None:
    plot.add_tools(
        HoverTool(
            renderers=list(renderers), mode="vline", tooltips=[("step", "@x{0,0}"), *shown],
            line_policy="nearest",
        )
    )  # fmt: skip


def legend(plot: Any) -> None:
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
