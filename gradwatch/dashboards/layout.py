"""Rows of panels in, placed and numbered panels out, whose queries select the chosen runs.

Grafana's grid is 24 columns wide. Ids follow the position, so that they stay the same as long
as the dashboard does, and refIds count from A in every panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from gradwatch.dashboards.panels import Json
from gradwatch.dashboards.promql import selecting

__all__ = ["COLUMNS", "DATASOURCE", "Line", "Row", "line", "place"]

COLUMNS = 24
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Line:
    """Panels beside each other."""

    height: int
    """In grid units of about 30 pixels."""

    panels: tuple[Json, ...]
    widths: tuple[int, ...]
    """In columns, one per panel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A heading with lines of panels below it."""

    title: str
    lines: Sequence[Line]
    collapsed: bool = False
    """Whether a reader has to open it; its queries run only then."""


def line(height: int, *panels: Json, widths: tuple[int, ...] = ()) -> Line:
    """Panels that fill the line, equally wide unless `widths` says otherwise.

    Raises ValueError where the widths do not add up to the grid.
    """
    widths = widths or (COLUMNS // len(panels),) * len(panels)
    if sum(widths) != COLUMNS or len(widths) != len(panels):
        raise ValueError(
            f"a line must have one width per panel, {COLUMNS} columns in all. "
            f"Received: {len(panels)} panels, widths={widths}"
        )
    return Line(height, panels, widths)


def place(rows: Sequence[Row], *, ranks: bool = True) -> list[Json]:
    """The `panels` of a dashboard: headings and panels from top to bottom.

    Args:
        ranks: whether the dashboard has the variable rank, for its queries to select by.
    """
    placed: list[Json] = []
    next_id, top = 1, 0
    for row in rows:
        heading = _heading(row, next_id, top)
        inside = _fill(row.lines, next_id + 1, top + 1, ranks)
        next_id += 1 + len(inside)
        top += 1 + sum(line.height for line in row.lines)
        placed.append(heading)
        (heading["panels"] if row.collapsed else placed).extend(inside)
    return placed


def _heading(row: Row, panel_id: int, top: int) -> Json:
    return {
        "collapsed": row.collapsed,
        "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
        "id": panel_id,
        "panels": [],
        "title": row.title,
        "type": "row",
    }


def _fill(lines: Sequence[Line], first_id: int, top: int, ranks: bool) -> list[Json]:
    filled: list[Json] = []
    for line in lines:
        left = 0
        for panel, width in zip(line.panels, line.widths, strict=True):
            spot = {"h": line.height, "w": width, "x": left, "y": top}
            filled.append(_placed(panel, first_id + len(filled), spot, ranks))
            left += width
        top += line.height
    return filled


def _placed(panel: Json, panel_id: int, spot: Json, ranks: bool) -> Json:
    targets = [
        {
            **target,
            "datasource": DATASOURCE,
            "expr": selecting(target["expr"], ranks=ranks),
            "refId": ref,
        }
        for ref, target in zip(ascii_uppercase, panel["targets"], strict=False)
    ]
    return {
        **panel,
        "datasource": DATASOURCE,
        "gridPos": spot,
        "id": panel_id,
        "targets": targets,
    }
