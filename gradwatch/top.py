"""`gradwatch top`: how a run stands, in a terminal, once a second.

    Watched.look() -> one screen: verdict, norm, oddest layers, last findings

Meaning is in words and shapes; colour only repeats it, and is left out where there is none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.chart import columns, log_chart, span
from gradwatch.page.watched import Seen, Watched
from gradwatch.recording.reader import open_recording
from gradwatch.report.card import printable
from gradwatch.report.findings import ORDER, listed
from gradwatch.report.moments import duration
from gradwatch.report.standing import RECENT
from gradwatch.report.verdict import Health
from gradwatch.stopping import stoppable

__all__ = ["screen", "top_command"]

STYLES: dict[Health, str] = {
    "healthy": "bold green", "over": "bold yellow", "warning": "bold yellow", "alert": "bold red",
    "unknown": "bold",
}  # fmt: skip
MARKS: dict[Health, str] = {
    "healthy": "OK", "over": "OK", "warning": "!", "alert": "!!", "unknown": "?",
}  # fmt: skip
LEVEL_STYLES = {"alert": "red", "warning": "yellow"}
CHART_HEIGHT = 4
MARGIN = 10
DOZE_SECONDS = 0.1
LEAST_COLUMNS = 20
MOST_LAYERS, MOST_FINDINGS = 10, 12
WORD = 12


def top_command(
    recording: Annotated[
        Path,
        typer.Argument(help="A recording, or a directory of them: its newest.", show_default=False),
    ],
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once; so is any output that is no terminal.")
    ] = False,
) -> None:
    """Shows how a run stands, live in a terminal: verdict, norm, oddest layers, last findings.

    Works over ssh, and without colour (NO_COLOR, TERM=dumb). Ctrl-C ends it.
    """
    with open_recording(recording) as opened:
        watched = Watched(opened.path)
    console = Console(highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal:
        console.print(screen(watched, console.width, _height(console)))
        return
    with stoppable() as stop, Live(console=console, screen=True, auto_refresh=False) as live:
        _follow(watched, console, live, every, stop)


def _follow(
    watched: Watched, console: Console, live: Live, every: float, stop: Callable[[], bool]
) -> None:
    while not stop():
        live.update(screen(watched, console.width, console.height), refresh=True)
        until = time.monotonic() + every
        while not stop() and time.monotonic() < until:
            time.sleep(min(DOZE_SECONDS, every))


def _height(console: Console) -> int:
    """Of a pipe there is no end."""
    return console.height if console.is_terminal else 60


def screen(watched: Watched, width: int, height: int) -> RenderableType:
    """One picture of a run, that fits into a terminal.

    Raises:
        RecordingError: the recording cannot be read.
    """
    seen = watched.look()
    head, chart = _head(seen), _chart(watched, seen, width)
    # A title, an empty line and a header each, and the line that the cursor needs.
    left = height - sum(_rows(line, width) for line in head) - 6
    parts: list[RenderableType] = [*head]
    if left > len(chart):
        parts += [Text(""), *chart]
        left -= len(chart) + 1
    layers = min(MOST_LAYERS, max(left - left // 2, 0))
    if layers and seen.worst:
        parts += [Text(""), _layers(seen, width, layers)]
    findings = left - min(layers, len(seen.worst))
    if findings > 0:
        parts += [Text(""), *_findings(seen, min(findings, MOST_FINDINGS))]
    return Group(*parts)


def _rows(line: Text, width: int) -> int:
    """Lines that it takes, a long word at the end of one included."""
    return max(1, -(-(line.cell_len + WORD) // width) if line.cell_len > width else 1)


def _head(seen: Seen) -> list[Text]:
    stands = seen.stands
    known, verdict = stands.known, stands.verdict
    name = printable(stands.info.run)
    lines = [
        Text(f"{name}, rank {stands.info.rank}: {stands.state}{_reached(seen)}"),
        Text(f"{MARKS[verdict.health]}  {printable(verdict.headline, 400)}",
             style=STYLES[verdict.health]),
    ]  # fmt: skip
    lines += [Text(f"{label:<9} {printable(text, 400)}") for label, text in verdict.lines]
    latest = stands.latest
    if latest is not None:
        mode = "mode shadow: " if stands.info.is_shadow else ""
        lines.append(
            Text(
                f"{mode}clipped {stands.clipped:.0%} of the last {RECENT} steps   skipped "
                f"{seen.skipped}   {known.step_seconds:.3g} s a step"
            )
        )
    return lines


def _reached(seen: Seen) -> str:
    known = seen.stands.known
    if known.step is None:
        return ", no step yet"
    ago = duration(max(0.0, time.time() - known.last_time))
    return f", step {known.step:,}, {ago} ago"


def _chart(watched: Watched, seen: Seen, width: int) -> list[Text]:
    grid = watched.grid(seen.first, seen.last + 1)
    if grid is None:
        return []
    norms = grid.numbers["total_norm"].tolist()
    room = max(LEAST_COLUMNS, width - MARGIN)
    values = columns(norms, len(norms), min(room, len(norms)))
    limits = span(values)
    rows = log_chart(values, CHART_HEIGHT)
    labels = [""] * CHART_HEIGHT
    if limits is not None:
        labels[0], labels[-1] = f"{limits[1]:.3g}", f"{limits[0]:.3g}"
    title = f"total norm before clipping, steps {seen.first:,} to {seen.last:,}, logarithmic"
    return [
        Text(title, style="dim"),
        *(
            Text(f"{label:>{MARGIN - 2}} {row}", no_wrap=True, overflow="crop")
            for label, row in zip(labels, rows, strict=True)
        ),
    ]


def _layers(seen: Seen, width: int, most: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    healthy = seen.stands.verdict.health == "healthy"
    title = "layers, beside their usual norm" if healthy else "furthest from their usual norm"
    table.add_column(title, no_wrap=True, max_width=max(24, width - 40))
    for name in ("norm", "usual", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    layers = seen.stands.info.layout.layers
    for place, norm, usual in seen.worst[:most]:
        times = norm / usual if usual else math.nan
        table.add_row(
            Text(printable(layers[place], 80)), f"{norm:.4g}", f"{usual:.4g}", f"{times:.3g}"
        )
    return table


def _findings(seen: Seen, most: int) -> list[Text]:
    known = seen.stands.known
    events = listed(known.anomalies, known.cards, 1).said_of_events
    findings = listed(known.anomalies, known.cards, max(1, most - bool(events)))
    if not findings.all:
        return [Text(f"no finding{events and '; '}{events}", style="dim")]
    lines = [Text(f"findings, {ORDER}", style="dim", no_wrap=True, overflow="ellipsis")]
    for place, one in enumerate(findings.all):
        if findings.left_out and place == len(findings.first):
            lines[0].append(f"; {findings.left_out} behind the first left out")
        line = f"step {one.step:<8} {one.level:<8} {one.kind}: {printable(one.message, 400)}"
        lines.append(
            Text(line, style=LEVEL_STYLES.get(one.level, ""), no_wrap=True, overflow="ellipsis")
        )
    if events and most > 1:
        lines.append(Text(events, style="dim", no_wrap=True, overflow="ellipsis"))
    return lines
