"""Runs in, a plain table out. Everything from outside is escaped, and cut where it is long."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from dataclasses import dataclass

from gradwatch.report.card import printable
from gradwatch.tally import Snapshot

__all__ = ["Line", "page"]

HEAD = ("run", "rank", "state", "step", "last step", "open alerts", "recording", "")


@dataclass(frozen=True, slots=True)
class Line:
    """One recording in the table."""

    snapshot: Snapshot
    instead: str
    """What is said instead of the state; nothing where the run is in /metrics."""

    path: str
    note: str


def page(lines: Iterable[Line], refused: Iterable[tuple[str, str]]) -> str:
    """A table of runs, and a list of files that cannot be read with the reason of each."""
    rows = "".join(_row(_cells(line), "td") for line in sorted(lines, key=_order))
    table = f"<table>{_row(HEAD, 'th')}{rows}</table>" if rows else "<p>no recording</p>"
    items = "".join(f"<li>{_safe(path)}: {_safe(reason)}</li>" for path, reason in refused)
    return table + (f"<h2>not readable</h2><ul>{items}</ul>" if items else "")


def _order(line: Line) -> tuple[bool, str, int]:
    return line.snapshot.state != "running", line.snapshot.info.run, line.snapshot.info.rank


def _cells(line: Line) -> tuple[str, ...]:
    snapshot = line.snapshot
    step, when = (snapshot.numbers.get(n) for n in ("step", "last_step_timestamp_seconds"))
    return (
        snapshot.info.run,
        str(snapshot.info.rank),
        line.instead or snapshot.state,
        "" if step is None else f"{step:.0f}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "",
        ", ".join(sorted(snapshot.active)),
        line.path,
        line.note,
    )


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_safe(cell)}</{tag}>' for cell in cells)}</tr>\n"


def _safe(text: str) -> str:
    return html.escape(printable(text).encode("utf-8", "replace").decode())
