"""Columns of a picture: what they hold is what the steps held, at each width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.page.colours import THEMES, oklab
from gradwatch.page.columns import DEPARTURE, Heat, heat_of, run_columns, told_of
from gradwatch.page.figures import run_figures
from gradwatch.page.grid import columns_for, grid_of, joined
from gradwatch.page.layer import departure, layer_columns
from gradwatch.page.overview import Overview
from gradwatch.page.reading import NUMBERS, Rows, layer_norms
from gradwatch.page.watched import Watched
from gradwatch.records import Layout, Parameter


def rows_of(norms_NL, first: int = 0) -> Rows:
    norms_NL = np.asarray(norms_NL, dtype=np.float32)
    count = len(norms_NL)
    totals = np.sqrt(np.square(norms_NL, dtype=np.float64).sum(axis=1))
    numbers = {name: np.full(count, np.nan) for name in NUMBERS}
    numbers |= {"total_norm": totals, "clipped": np.zeros(count), "skipped": np.zeros(count)}
    return Rows(count, np.arange(first, first + count), numbers, {}, norms_NL)


@given(
    count=st.integers(1, 300),
    first=st.integers(0, 1000),
    width=st.sampled_from([1, 2, 8, 64]),
    factor=st.sampled_from([1, 2, 16]),
    seed=st.integers(0, 10),
)
def test_a_column_is_the_largest_of_its_steps_however_it_was_made(
    count, first, width, factor, seed
):
    norms = np.random.default_rng(seed).lognormal(size=(count, 3)).astype(np.float32)
    rows = rows_of(norms, first)
    grid = grid_of(rows, width).widened(factor)
    index = rows.steps_N // (width * factor)
    assert grid.index_C.tolist() == sorted(set(index.tolist()))
    for place, column in enumerate(grid.index_C):
        np.testing.assert_array_equal(grid.peaks_CL[place], norms[index == column].max(axis=0))
        assert grid.numbers["count"][place] == (index == column).sum()
    half = count // 2
    parts = [rows_of(norms[:half], first), rows_of(norms[half:], first + half)]
    both = joined([grid_of(part, width) for part in parts if len(part.steps_N)]).widened(factor)
    np.testing.assert_array_equal(both.peaks_CL, grid.peaks_CL)


def test_steps_that_come_again_after_a_resume_are_in_one_column():
    again = joined([grid_of(rows_of([[1.0]] * 20), 4), grid_of(rows_of([[3.0]] * 10, 10), 4)])
    assert again.index_C.tolist() == [0, 1, 2, 3, 4]
    assert again.peaks_CL[:, 0].tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("spike", [0, 1, 4999, 60_001, 99_999])
def test_a_spike_of_one_step_is_in_the_overview_of_a_long_run(spike):
    norms = np.full((100_000, 2), 0.5, dtype=np.float32)
    norms[spike, 1] = 70.0
    overview = Overview(2)
    for start in range(0, len(norms), 4096):
        overview.add(rows_of(norms[start : start + 4096], start))
    grid = overview.grid()
    assert len(grid.index_C) <= 4096
    (place,) = np.flatnonzero(grid.peaks_CL[:, 1] == 70)
    assert grid.steps_C[place] <= spike < grid.steps_C[place] + grid.width
    assert (grid.peaks_CL[:, 0] == 0.5).all()


def test_the_baseline_is_what_was_before_and_no_explosion_becomes_usual_at_once():
    norms = np.full((4000, 1), 0.1, dtype=np.float32)
    norms[2000:] = 100.0
    overview = Overview(1)
    overview.add(rows_of(norms))
    grid = overview.grid()
    departures = np.log10(grid.peaks_CL[:, 0]) - grid.usual_CL[:, 0]
    at = grid.steps_C
    assert np.abs(departures[at < 2000]).max() < 0.01
    assert departures[(at >= 2000) & (at < 2400)].min() > 1.0


def test_an_explosion_is_usual_when_it_has_lasted_and_a_fall_at_once():
    norms = np.full((6000, 2), 1.0, dtype=np.float32)
    norms[2000:, 0], norms[2000:, 1] = 100.0, 0.01
    overview = Overview(2)
    overview.add(rows_of(norms))
    grid = overview.grid()
    usual = dict(zip(grid.steps_C.tolist(), grid.usual_CL.tolist(), strict=True))
    assert usual[3984][0] == pytest.approx(0, abs=1e-6)
    assert usual[5984][0] > 1
    assert usual[3984][1] < -1.5


def test_what_rises_while_a_run_starts_becomes_usual_at_once():
    norms = np.ones((600, 1), dtype=np.float32)
    norms[:48] = 0.01
    overview = Overview(1)
    overview.add(rows_of(norms))
    assert overview.grid().usual_CL[-1, 0] > -0.5


def test_live_rows_make_the_same_baseline_as_rows_at_once():
    norms = np.random.default_rng(0).lognormal(size=(700, 4)).astype(np.float32)
    at_once, live = Overview(4), Overview(4)
    at_once.add(rows_of(norms))
    for step in range(len(norms)):
        live.add(rows_of(norms[step : step + 1], step))
    np.testing.assert_allclose(live.grid().usual_CL[1:], at_once.grid().usual_CL[1:], atol=1e-5)
    np.testing.assert_array_equal(live.grid().peaks_CL, at_once.grid().peaks_CL)


@given(count=st.integers(1, 10**9), most=st.integers(1, 5000))
def test_columns_are_as_many_as_were_asked_for_at_most(count, most):
    width = columns_for(count, most)
    assert -(-count // width) <= most
    assert width == 1 or -(-count // (width // 2)) > most


def test_the_norm_of_a_layer_is_that_of_its_tensors_and_infinite_where_one_is_not_finite():
    names = ["a.weight", "b.weight", "a.bias"]
    layout = Layout.of([Parameter(name=name) for name in names])
    tensors = np.array([[3, 1, 4], [np.nan, 1, 4], [3e30, 1, 4e30]], dtype=np.float32)
    norms = layer_norms(layout, tensors)
    np.testing.assert_allclose(norms, [[5, 1], [np.inf, 1], [5e30, 1]], rtol=1e-6)


class TestPicture:
    def test_what_is_not_finite_is_nan_and_what_is_not_there_is_a_gap(self):
        rows = rows_of([[1.0], [np.inf], [1.0]])
        rows.steps_N[2] = 5
        heat = heat_of(grid_of(rows, 1))
        (picture,) = heat.columns["absolute"]
        assert picture.shape == (1, 6)
        assert np.isnan(picture[0, 1])
        assert (picture[0, 2:5] < -90).all()
        assert picture[0, 0] == picture[0, 5] == 0

    def test_neighbours_share_a_row_that_shows_the_largest(self):
        norms = np.ones((3, 1000), dtype=np.float32)
        norms[1, 777] = 100
        heat = heat_of(grid_of(rows_of(norms), 1), most_rows=256)
        (picture,) = heat.columns["absolute"]
        assert heat.layers_a_row == 4
        assert picture.shape == (250, 3)
        assert np.argwhere(picture > 1).tolist() == [[777 // 4, 1]]

    def test_no_gradient_is_as_far_below_as_is_shown(self):
        rows = rows_of([[1.0], [0.0]])
        overview = Overview(1)
        overview.add(rows)
        (picture,) = heat_of(overview.grid()).columns["departure"]
        assert picture.min() >= -DEPARTURE

    @pytest.mark.parametrize("first", [0, 1000])
    def test_start_up_has_no_colour_and_what_is_a_hundred_times_as_large_has(self, first):
        norms = np.geomspace(0.1, 3, 400)[:, None].astype(np.float32) * [1, 1]
        norms[130:] = 3
        norms[60, 1], norms[90, 1] = 400, np.inf
        overview = Overview(2)
        overview.add(rows_of(norms, first))
        grid = overview.grid().between(first, first + 400)
        columns = run_columns(grid, (), (), begun=first)
        (picture,) = columns["heat"]["departure"]
        learning = (grid.steps_C < first + 128).sum()
        assert (picture[0, :learning] == 0).all()
        coloured = np.flatnonzero(np.nan_to_num(picture[1, :learning], nan=9))
        at = [np.searchsorted(grid.steps_C, first + odd, "right") - 1 for odd in (60, 90)]
        assert coloured.tolist() == at
        ((left,), (right,)) = columns["learning"]["left"], columns["learning"]["right"]
        assert left <= first < first + 127 < right <= first + 128 + grid.width

    def test_later_steps_are_not_hatched(self):
        grid = grid_of(rows_of(np.ones((50, 2)), 500), 1)
        assert run_columns(grid, (), ())["learning"]["left"] == []

    def test_a_run_without_steps_has_columns_of_nothing(self):
        columns = run_columns(None, (), ("global",))
        assert all(len(columns[name]["x"]) == 0 for name in ("norm", "clip", "training", "noise"))


class TestFigures:
    def told(self, **numbers):
        rows = rows_of(np.ones((40, 1)))
        columns = {"micro_batches": np.ones(40), **numbers}
        changed = {k: np.broadcast_to(v, 40).astype(float) for k, v in columns.items()}
        rows.numbers.update(changed)
        return told_of(grid_of(rows, 1))

    def test_a_loss_that_spans_decades_is_drawn_on_a_log_axis(self):
        assert self.told(loss=np.geomspace(3, 0.2, 40)) == ["log loss"]
        assert self.told(loss=np.linspace(3, 0.5, 40)) == ["loss"]
        assert self.told(loss=np.linspace(3, -0.5, 40)) == ["loss"]
        assert self.told(loss=np.array([np.inf, *np.linspace(3, 0.5, 39)])) == ["loss"]

    def test_a_learning_rate_that_changes_is_among_what_explains_a_verdict(self):
        warm = np.linspace(1e-4, 1e-3, 40)
        for rates, order in (
            (warm, ["norm", "loss", "settings", "heat", "clip"]),
            (1e-3, ["norm", "loss", "heat", "clip", "settings"]),
        ):
            told = self.told(loss=1.0, learning_rate=rates)
            columns = run_columns(None, (), ())
            heat = Heat(columns["heat"], -1.0, 0.0, 1)
            drawn = run_figures(columns, heat, ("a",), (), (0, 1), told)
            assert [one.name for one in drawn] == order


class TestLayer:
    def test_departures_are_in_units_of_the_spread_before(self):
        random = np.random.default_rng(0)
        norms = np.exp(random.normal(0, 0.5, 1000))
        z = departure(norms)
        before = np.log(norms[500 - 128 : 500])
        spread = 1.4826 * np.median(np.abs(before - np.median(before)))
        assert z[500] == pytest.approx((np.log(norms[500]) - np.median(before)) / spread)
        assert np.isnan(z[:32]).all()

    def test_a_norm_that_is_not_finite_is_no_departure_and_moves_none(self):
        norms = np.full(300, 2.0)
        norms[100:110] = np.inf
        z = departure(norms)
        assert np.isnan(z[100:110]).all()
        assert z[110] == 0

    def test_columns_are_those_of_the_recording(self, record):
        run = record("one", layers=5)
        run.steps(200, spikes={150: 50.0})
        columns = layer_columns(run.path, run.pipeline.info, 2, 0, 200)
        step = columns["layer norm"]["x"].tolist().index(150)
        watched = Watched(run.path)
        watched.look()
        grid = watched.grid(150, 151)
        np.testing.assert_allclose(
            [columns["layer norm"][f"norm {k}"][step] for k in range(5)], grid.peaks_CL[0]
        )
        assert columns["z"]["z"][step] > 6
        assert columns["coef"]["coef"][step] == pytest.approx(grid.numbers["clip_coef"][0])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", ["departure", "absolute"])
def test_equal_steps_of_a_scale_look_equal(theme, kind):
    """Distances in OKLab are as people see them. One in eight, since 8-bit colours round them."""
    colours = THEMES[theme][kind]
    half = len(colours) // 2
    for arm in (colours[: half + 1], colours[half:]) if kind == "departure" else (colours,):
        labs = np.array([oklab(colour) for colour in arm[::8]])
        distances = np.linalg.norm(np.diff(labs, axis=0), axis=1)
        assert distances.max() < 1.25 * distances.min()
        assert (np.diff(labs[:, 0]) > 0).all() or (np.diff(labs[:, 0]) < 0).all()


@pytest.mark.parametrize("theme", THEMES)
def test_what_is_as_usual_has_no_colour(theme):
    colours = THEMES[theme]["departure"]
    _, *chroma = oklab(colours[len(colours) // 2])
    assert np.abs(chroma).max() < 0.02
