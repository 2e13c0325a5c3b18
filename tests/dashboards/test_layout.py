"""Placing: a line is full, ids count, lines stack."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.dashboards.layout import COLUMNS, Line, Row, line, place


def _panel() -> dict[str, object]:
    return {"targets": [{"expr": "up"}, {"expr": "up"}]}


@st.composite
def lines(draw: st.DrawFn) -> Line:
    cuts = draw(st.sets(st.integers(1, COLUMNS - 1), max_size=7))
    edges = [0, *sorted(cuts), COLUMNS]
    widths = tuple(right - left for left, right in pairwise(edges))
    return line(draw(st.integers(1, 12)), *(_panel() for _ in widths), widths=widths)


rows = st.builds(
    Row, title=st.just("row"), lines=st.lists(lines(), max_size=4), collapsed=st.booleans()
)


@given(st.lists(rows, max_size=5))
def test_every_cell_of_the_grid_belongs_to_exactly_one_panel(drawn: list[Row]) -> None:
    flat = [p for top in place(drawn) for p in (top, *top.get("panels", []))]
    cells = [
        (x, y)
        for spot in (panel["gridPos"] for panel in flat)
        for x in range(spot["x"], spot["x"] + spot["w"])
        for y in range(spot["y"], spot["y"] + spot["h"])
    ]
    bottom = sum(1 + sum(one.height for one in row.lines) for row in drawn)
    assert sorted(cells) == [(x, y) for x in range(COLUMNS) for y in range(bottom)]
    assert [panel["id"] for panel in flat] == list(range(1, len(flat) + 1))


def test_panels_share_a_line_equally_when_nothing_else_is_said() -> None:
    assert line(3, _panel(), _panel(), _panel()).widths == (8, 8, 8)


@pytest.mark.parametrize("widths", [(12, 11), (24,), (8, 8, 8)])
def test_a_line_that_is_not_full_is_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="24 columns in all"):
        line(3, _panel(), _panel(), widths=widths)


def test_targets_of_each_panel_count_from_a() -> None:
    placed = place([Row(title="row", lines=[line(3, _panel(), _panel())])])
    assert [[t["refId"] for t in panel["targets"]] for panel in placed[1:]] == [["A", "B"]] * 2
