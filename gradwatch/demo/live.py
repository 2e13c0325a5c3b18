"""The live view: as many lines as the terminal has, the most telling ones first.

Monitor -> lines of rich text, at most ten times a second
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradwatch.chart import columns, log_chart, span
from gradwatch.demo.monitor import LayerNow, Monitor
from gradwatch.report.kinds import name_of

__all__ = ["LiveView"]

REFRESH_SECONDS = 0.1
LEVEL_STYLES = {"event": "yellow", "warning": "yellow", "alert": "bold red"}
FIXED_LINES = 7
"""All but the rows of the chart and of the layers."""

MOST_CHART_ROWS = 6
MOST_LAYERS = 8


class LiveView:
    """Draws in place and leaves nothing behind; what gradwatch logs scrolls by above it."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._next_refresh = 0.0
        self._started = time.monotonic()

    @contextmanager
    def shown(self, monitor: Monitor) -> Iterator[None]:
        with self._live:
            yield

    def step(self, monitor: Monitor, done: int) -> None:
        """Draws, where the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next_refresh and done < monitor.num_steps:
            return
        monitor.update(done)
        self._live.update(self._frame(monitor), refresh=True)
        # Counted from the end of the drawing, so that a slow terminal costs no more than half.
        self._next_refresh = max(now + REFRESH_SECONDS, 2 * time.monotonic() - now)

    def _frame(self, monitor: Monitor) -> RenderableType:
        width, height = self._console.size
        spare = height - 1 - FIXED_LINES
        rows = min(max(spare // 2, 1), MOST_CHART_ROWS)
        layers = min(spare - rows - 1, MOST_LAYERS)
        return Group(
            _line(self._title, "bold"),
            self._progress(monitor, width),
            _line(self._figures(monitor)),
            _line(_anomaly_sentence(monitor), _anomaly_style(monitor)),
            *_chart(monitor, width, rows),
            *_layers(monitor, layers, width),
            _line(_where(monitor), "dim"),
        )

    def _progress(self, monitor: Monitor, width: int) -> RenderableType:
        done, total = monitor.done, monitor.num_steps
        elapsed = time.monotonic() - self._started
        left = f"{elapsed / done * (total - done):.0f} s left" if done else ""
        row = Table.grid(padding=(0, 1))
        row.add_row(
            f"step {done}/{total}",
            ProgressBar(total=total, completed=done, width=max(width - 32, 5)),
            Text(left, style="dim"),
        )
        return row

    def _figures(self, monitor: Monitor) -> str:
        latest = monitor.latest
        if latest is None:
            return ""
        figures = [
            f"loss {latest.scalars.get('loss', float('nan')):.3g}",
            f"total norm {latest.total_norm:.3g}",
            f"clipped {monitor.share_clipped():.0%}",
            f"skipped {monitor.num_skipped()}",
            f"learning rate {latest.learning_rate:g}",
        ]
        return _fitting(figures, self._console.width)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _fitting(parts: list[str], width: int) -> str:
    """As many parts as one line holds."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 3 + len(part) <= width:
            line = f"{line}   {part}"
    return line


def _anomaly_sentence(monitor: Monitor) -> str:
    open_kinds = monitor.open_kinds()
    if open_kinds:
        return "   ".join(
            f"{kind}: {', '.join(layers) or 'the whole model'}"
            for kind, layers in sorted(open_kinds.items())
        )
    if not monitor.anomalies:
        return "no anomaly so far"
    last = monitor.anomalies[-1]
    return f"no anomaly open; the last was {name_of(last.kind)} at step {last.step}"


def _anomaly_style(monitor: Monitor) -> str:
    if monitor.open_kinds():
        return LEVEL_STYLES["alert"]
    return "yellow" if monitor.anomalies else "green"


def _chart(monitor: Monitor, width: int, rows: int) -> list[Text]:
    """A caption, `rows` lines of chart and one of marks below the anomalies."""
    values = columns(monitor.total_norms, monitor.num_steps, width)
    limits = span(values)
    between = f", {limits[0]:.2g} to {limits[1]:.3g}" if limits else ""
    marks = Text(no_wrap=True)
    levels = {a.step * width // monitor.num_steps: a.level for a in tuple(monitor.anomalies)}
    for column in range(max(levels, default=-1) + 1):
        level = levels.get(column)
        marks.append("▲" if level else " ", LEVEL_STYLES.get(level or "", ""))
    return [
        _line(f"total norm{between} (log scale, before clipping)", "dim"),
        *(_line(line, "cyan") for line in log_chart(values, rows)),
        marks,
    ]


def _layers(monitor: Monitor, count: int, width: int) -> list[Text]:
    """The worst layers below a caption; nothing where there is no room."""
    layers = monitor.worst_layers(max(count, 0))
    if not layers:
        return []
    name = max(min(max(len(layer.layer) for layer in layers), width - 30), 8)
    caption = f"{'layer':<{name}} {'norm':>9} {'of median':>9}"
    return [_line(caption, "dim"), *(_layer_line(layer, name, width) for layer in layers)]


def _layer_line(layer: LayerNow, name: int, width: int) -> Text:
    """Name, norm, how many times its median, and a block for each doubling of that."""
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{layer.layer[-name:]:<{name}} {layer.norm:>9.3g} ")
    if not math.isfinite(layer.ratio):
        return line.append("not finite", LEVEL_STYLES["alert"])
    style = "red" if layer.ratio > 4 else "green"
    line.append(f"{layer.ratio:>7.3g}x ", style)
    doublings = int(math.log2(max(layer.ratio, 1.0)))
    return line.append("█" * min(doublings, max(width - name - 20, 0)), style)


def _where(monitor: Monitor) -> str:
    url = monitor.watch.url
    return f"metrics at {url}" if url else "metrics are not served"
