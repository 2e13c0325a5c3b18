"""What the chart promises: its size, its order, and that no spike gets lost in it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gradwatch.chart import columns, log_chart, span

norms = st.floats(min_value=1e-30, max_value=1e30)
anything = st.one_of(norms, st.just(0.0), st.just(math.nan), st.just(math.inf))
HEIGHT = " ▁▂▃▄▅▆▇█"


def eighths(lines: list[str], column: int) -> int:
    return sum(HEIGHT.index(line[column]) for line in lines)


@given(st.lists(anything, max_size=40), st.integers(1, 6))
def test_a_chart_has_the_asked_size_whatever_it_shows(values, height):
    lines = log_chart(values, height)
    assert len(lines) == height
    assert {len(line) for line in lines} == {len(values)}


@given(st.lists(norms, min_size=2, max_size=40), st.integers(1, 6))
def test_a_larger_value_is_never_drawn_lower_and_none_is_invisible(values, height):
    lines = log_chart(values, height)
    drawn = [eighths(lines, i) for i in range(len(values))]
    by_value = [level for _, level in sorted(zip(values, drawn, strict=True))]
    assert by_value == sorted(by_value)
    assert min(drawn) >= 1


def test_least_and_largest_value_fill_the_chart_from_bottom_to_top():
    lines = log_chart([0.01, 0.1, 1.0], 2)
    assert [eighths(lines, i) for i in (0, 2)] == [1, 16]
    assert eighths(lines, 1) in (8, 9)  # the geometric middle


def test_what_is_not_finite_is_a_cross_in_every_line_and_nothing_is_blank():
    assert log_chart([math.inf, None, 1.0, 2.0], 2) == ["×  █", "× ▁█"]


@given(st.lists(norms, min_size=1, max_size=300), st.integers(1, 120), st.data())
def test_no_spike_is_lost_in_the_columns(values, width, data):
    total = data.draw(st.integers(len(values), 400))
    peaks = columns(values, total, width)
    assert len(peaks) == width
    assert max(peak for peak in peaks if peak is not None) == max(values)


@given(st.lists(norms, min_size=1, max_size=100), st.integers(1, 50))
def test_a_step_that_is_not_finite_is_not_averaged_away(values, width):
    assert math.inf in columns([*values, math.nan], len(values) + 1, width)


def test_columns_are_empty_where_the_run_has_not_been_yet():
    assert columns([1.0, 2.0], 4, 4) == [1.0, 2.0, None, None]
    assert columns([], 10, 3) == [None, None, None]


def test_the_span_leaves_out_what_a_log_scale_cannot_show():
    assert span([None, 0.0, 0.5, math.inf, 3.0]) == (0.5, 3.0)
    assert span([None, 0.0]) is None
