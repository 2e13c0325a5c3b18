"""`gradwatch top`: how a run stands, in a terminal, once a second.

    Watched.look() -> parts of any size -> one screen: as much of each as there is room for

Meaning is in words and shapes; colour only repeats it, and is left out where there is none.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gradwatch.chart import columns, log_chart, span
from gradwatch.errors import RecordingError
from gradwatch.keys import typed_keys
from gradwatch.page.grid import Grid
from gradwatch.page.watched import Seen, Watched
from gradwatch.recording.runs import runs_in
from gradwatch.report.card import printable
from gradwatch.report.choosing import Named, chosen, folder_of
from gradwatch.report.findings import ORDER, listed, most_urgent
from gradwatch.report.moments import duration
from gradwatch.report.standing import RECENT
from gradwatch.report.verdict import Health
from gradwatch.saying import one_line
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
HEADINGS = ("furthest from their usual norm", "furthest from", "layer")
HEADINGS_HEALTHY = ("layers, beside their usual norm", "layer")
"""The longest that there is room for."""

MARGIN = 10
LEAST_NAME = 12
LONGEST_BEFORE = 30
GAP = 2
"""Between columns."""

QUIT = "q"
DOZE_SECONDS = 0.1


def _up_to(name: str, size: int, start: int = 1) -> list[tuple[str, int]]:
    return [(name, one) for one in range(start, size + 1)]


WISHES: Sequence[tuple[str, int]] = (
    ("title", 1), *_up_to("headline", 3),
    *_up_to("layers", 3), *_up_to("findings", 2), ("chart", 1),
    *_up_to("headline", 8, 4), *_up_to("to do", 4), ("events", 1),
    ("above layers", 1), ("above findings", 1), ("above chart", 1), ("figures", 1),
    ("bottom", 1),
    *_up_to("now", 2), *_up_to("chart", 5, 3), *_up_to("layers", 5, 4), *_up_to("findings", 5, 3),
    *_up_to("now", 6, 3), *_up_to("began", 6), *_up_to("done", 6), *_up_to("worst", 6),
    *_up_to("to do", 6, 5), *_up_to("layers", 10, 6), *_up_to("findings", 12, 6),
)  # fmt: skip
"""Parts of a screen, each with a size that it asks for, the most important first; it gets the rows
for that where they are left."""

Part = Callable[[int], list[Text]]
"""The rows that it has in a size."""


def top_command(
    recording: Named = None,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once; so is any output that is no terminal.")
    ] = False,
) -> None:
    """Shows how a run stands, live in a terminal: verdict, norm, oddest layers, last findings.

    Works over ssh, and without colour (NO_COLOR, TERM=dumb). q or Ctrl-C ends it.
    """
    shown = Shown(recording)
    console = Console(highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal:
        console.print(screen(shown.watched, console.width, _height(console), shown.which))
        return
    with (
        stoppable() as stop,
        typed_keys() as typed,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        _follow(shown, console, live, every, stop, typed)


class Shown:
    """The run on the screen; of a directory its newest, also when that starts later."""

    def __init__(self, named: Path | None) -> None:
        """
        Raises:
            RecordingError: there is none, or it cannot be read.
        """
        self._folder = folder_of(named)
        self._known = self._there()
        path, self.which = chosen(named)
        self.watched = Watched(path)

    def go_over(self) -> None:
        """To a run that has started since, once its recording can be read."""
        with suppress(RecordingError):
            if self._folder is None or not self._there() - self._known:
                return
            path, which = chosen(self._folder)
            if path in self._known or path == self.watched.path:
                return
            before = printable(self.watched.info.run, LONGEST_BEFORE)
            self.watched = Watched(path)
            self.which = f"went over from {before} to {which}"
            self._known = self._there()

    def _there(self) -> set[Path]:
        return set() if self._folder is None else {run.path for run in runs_in(self._folder)}


def _follow(
    shown: Shown,
    console: Console,
    live: Live,
    every: float,
    stop: Callable[[], bool],
    typed: Callable[[float], str] | None,
) -> None:
    ends = "" if typed is None else f"{QUIT} ends"
    while not stop():
        shown.go_over()
        picture = screen(shown.watched, console.width, console.height, shown.which, ends)
        live.update(picture, refresh=True)
        until = time.monotonic() + every
        while not stop() and time.monotonic() < until:
            if typed is None:
                time.sleep(DOZE_SECONDS)
            elif QUIT in typed(DOZE_SECONDS).lower():
                return


def _height(console: Console) -> int:
    """With room for the prompt below it; of a pipe there is no end."""
    return console.height - 1 if console.is_terminal else 60


def screen(watched: Watched, width: int, height: int, which: str = "", ends: str = "") -> Group:
    """One picture of a run, at most `height` lines of at most `width` columns.

    Args:
        which: of several runs it is.
        ends: how to end it, where there is room.

    Raises:
        RecordingError: the recording cannot be read.
    """
    parts = _parts(watched, watched.look(), width)
    parts["bottom"] = lambda _: _bottom(which, ends, width)
    shown: dict[str, list[Text]] = {name: [] for name in parts}
    left = height
    for name, size in WISHES:
        if name not in parts:
            continue
        rows = parts[name](size)
        more = len(rows) - len(shown[name])
        if more <= left:
            left -= more
            shown[name] = rows
    return Group(*(row for rows in shown.values() for row in rows))


def _parts(watched: Watched, seen: Seen, width: int) -> dict[str, Part]:
    """From the top of the screen to its end."""
    stands = seen.stands
    verdict = stands.verdict
    headline = Text(
        f"{MARKS[verdict.health]}  {printable(verdict.headline, 400)}",
        style=STYLES[verdict.health],
    )
    norms = watched.grid(seen.first, seen.last + 1)
    return {
        "title": lambda _: [_row(_title(seen, width))],
        "headline": lambda size: _wrapped(headline, width, size),
        **{
            label: partial(_labelled, label, printable(text, 400), width)
            for label, text in verdict.lines
        },
        "figures": lambda _: _figures(seen),
        "above chart": lambda _: [] if norms is None else [Text("")],
        "chart": lambda size: [] if norms is None else _chart(norms, seen, width, size),
        "above layers": lambda _: [Text("")] if seen.worst else [],
        "layers": lambda size: _layers(seen, width, size),
        "above findings": lambda _: [Text("")],
        "findings": lambda size: _findings(seen, size),
        "events": lambda _: _events(seen),
    }


def _row(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _bottom(which: str, ends: str, width: int) -> list[Text]:
    both = f"{which}{'':{GAP}}{ends}" if which and ends else which or ends
    shown = both if cell_len(both) <= width else which
    return [_row(shown, "" if which else "dim")] if shown else []


def _wrapped(text: Text, width: int, most: int) -> list[Text]:
    """At words, and cut with an ellipsis where that takes more than `most` rows."""
    rows = list(text.wrap(Console(width=width), max(width, 1)))
    if len(rows) > most:
        rows = rows[:most]
        rows[-1].truncate(width - 2)
        rows[-1].append(" …")
    for row in rows:
        row.rstrip()
        row.no_wrap = True
    return rows


def _labelled(label: str, text: str, width: int, most: int) -> list[Text]:
    rows = _wrapped(Text(text), width - MARGIN, most)
    return [
        _row(f"{label if place == 0 else '':<{MARGIN}}").append_text(row)
        for place, row in enumerate(rows)
    ]


def _title(seen: Seen, width: int) -> str:
    info = seen.stands.info
    after = f", rank {info.rank}: {seen.stands.state}{_reached(seen)}"
    return f"{printable(info.run, max(LEAST_NAME, width - len(after)))}{after}"


def _reached(seen: Seen) -> str:
    known = seen.stands.known
    if known.step is None:
        return ", no step yet"
    ago = duration(max(0.0, time.time() - known.last_time))
    return f", step {known.step:,}, {ago} ago"


def _figures(seen: Seen) -> list[Text]:
    stands = seen.stands
    if stands.latest is None:
        return []
    mode = "mode shadow: " if stands.info.is_shadow else ""
    return [
        _row(
            f"{mode}clipped {stands.clipped:.0%} of the last {RECENT} steps   "
            f"skipped {seen.skipped}   {stands.known.step_seconds:.3g} s a step"
        )
    ]


def _chart(grid: Grid, seen: Seen, width: int, size: int) -> list[Text]:
    """A sparkline in one row; in more, a heading and a chart."""
    norms = grid.numbers["total_norm"].tolist()
    limits = span(norms)
    least, largest = (f"{limit:.3g}" for limit in limits) if limits else ("", "")
    if size == 1:
        label = f"norm, log {least:>{MARGIN - 2}} "
        values = columns(norms, len(norms), _room(width - len(label) - len(largest) - 1, norms))
        return [_row(f"{label}{log_chart(values, 1)[0]} {largest}")]
    values = columns(norms, len(norms), _room(width - MARGIN, norms))
    labels = [largest, *[""] * (size - 3), least]
    return [
        _row(
            f"total norm before clipping, steps {seen.first:,} to {seen.last:,}, logarithmic", "dim"
        ),
        *(
            _row(f"{label:>{MARGIN - 2}} {row}")
            for label, row in zip(labels, log_chart(values, size - 1), strict=True)
        ),
    ]


def _room(width: int, norms: Sequence[float]) -> int:
    return max(1, min(width, len(norms)))


def _layers(seen: Seen, width: int, most: int) -> list[Text]:
    """A heading and a row for each layer; the end of a long name, which tells more."""
    if not seen.worst:
        return []
    healthy = seen.stands.verdict.health == "healthy"
    layers = seen.stands.info.layout.layers
    cells = [("norm", "usual", "times")]
    for _, norm, usual in seen.worst[:most]:
        times = norm / usual if usual else math.nan
        cells.append((f"{norm:.4g}", f"{usual:.4g}", f"{times:.3g}"))
    columns_of = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names = [one_line(layers[place]) for place, _, _ in seen.worst[:most]]
    room = max(LEAST_NAME, width - sum(columns_of) - GAP * len(columns_of))
    titles = HEADINGS_HEALTHY if healthy else HEADINGS
    title = next((one for one in titles if len(one) <= room), titles[-1])
    widest = min(room, max(len(title), *map(len, names)))
    rows: list[Text] = []
    for name, row in zip([title, *names], cells, strict=True):
        shown = name if len(name) <= widest else f"…{name[1 - widest :]}"
        numbers = (f"{'':{GAP}}{cell:>{n}}" for cell, n in zip(row, columns_of, strict=True))
        rows.append(_row(f"{shown:<{widest}}{''.join(numbers)}", "" if rows else "dim"))
    return rows


def _findings(seen: Seen, most: int) -> list[Text]:
    """A heading and a row for each finding; where there is none, one row that says so."""
    known = seen.stands.known
    every = listed(known.anomalies, known.cards, sys.maxsize)
    if not every.all:
        events = every.said_of_events
        return [_row(f"no finding{events and '; '}{events}", "dim")]
    findings = most_urgent(every.all, most)
    more = len(every.all) - len(findings)
    rows = [
        _row(f"findings, {ORDER}{f'; {more} less urgent or older left out' * bool(more)}", "dim")
    ]
    widest = max(len(str(one.step)) for one in findings)
    for one in findings:
        where = f" in {printable(one.layer)}" if one.layer else ""
        line = f"step {one.step:<{widest}}  {one.level:<7}  {one.kind}{where}: "
        rows.append(_row(line + printable(one.message, 400), LEVEL_STYLES.get(one.level, "")))
    return rows


def _events(seen: Seen) -> list[Text]:
    """What is no finding, below those that are."""
    known = seen.stands.known
    findings = listed(known.anomalies, known.cards, 1)
    is_below = findings.all and findings.events
    return [_row(findings.said_of_events, "dim")] if is_below else []
