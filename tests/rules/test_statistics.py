"""Limits that learn: the published numbers, and what no stream may do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.policy import StatisticLimit
from gradwatch.rules.arrays import NUMBERS, NUMPY
from gradwatch.rules.statistics import Bounds, State, begun, bounds, goal, learned
from gradwatch.torch.arrays import TorchArrays

LIBRARIES = {
    "numpy": NUMPY,
    "numbers": NUMBERS,
    "torch": TorchArrays(torch.device("cpu")),
}
DEFAULT = StatisticLimit(z=4)
ZCLIP = StatisticLimit(z=2.5, space="raw", decay=0.97, warmup=25, learn="clipped", to="reciprocal")
AUTOCLIP = StatisticLimit(quantile=0.1, window="all", learn="raw", warmup=0)
SKIPSTEP = StatisticLimit(z=6, space="raw", window=128, warmup=64, learn="raw", floor=0)
EVERY = {
    "default": DEFAULT,
    "zclip": ZCLIP,
    "autoclip": AUTOCLIP,
    "skipstep": SKIPSTEP,
    "adagc": StatisticLimit(ratio=1.04, decay=0.99, warmup=100, until=1.0, learn="clipped"),
    "olmo ratio": StatisticLimit(ratio=2.0, decay=0.99, learn="raw"),
    "accepted": StatisticLimit(z=3, learn="accepted", warmup=10, to="mean"),
    "bounded": StatisticLimit(z=4, warmup=5, min=0.5, max=2.0),
}


def first(vector) -> float:
    """Of the first unit."""
    return float(np.asarray(vector).reshape(-1)[0])


class Stream:
    """One rule over U units, norms in, limits out."""

    def __init__(self, statistic: StatisticLimit, units: int = 1, library: str = "numpy") -> None:
        self.statistic, self.xp = statistic, LIBRARIES[library]
        self.state = begun(statistic, units, self.xp)

    def at(self, mu: float, v: float) -> Stream:
        """Warm, with these moments."""
        doubles = self.xp.doubles
        moments = (doubles(np.array([value])) for value in (1e6, mu, v))
        self.state = State(*moments, self.state.ring_UW, self.state.until_U)
        return self

    @property
    def found(self) -> Bounds:
        with np.errstate(all="ignore"):
            return bounds(self.statistic, self.state, self.xp)

    @property
    def limit(self) -> float:
        return first(self.found.limit_U)

    def see(self, *norms: float, usable: bool = True) -> float:
        """Takes a step in; what the first unit's norm becomes."""
        norms_U, found = self.xp.doubles(np.array(norms)), self.found
        with np.errstate(all="ignore"):
            to = first(goal(self.statistic, found, norms_U, self.xp))
            self.state = learned(self.statistic, self.state, found, norms_U, usable, self.xp)
        return to if norms[0] > first(found.limit_U) else norms[0]

    def play(self, norms) -> list[float]:
        """The limit of each step."""
        limits = []
        for norm in norms:
            limits.append(self.limit)
            self.see(float(norm))
        return limits


@pytest.mark.parametrize("library", LIBRARIES)
class TestReferenceNumbers:
    def test_the_default_limit(self, library):
        stream = Stream(DEFAULT, library=library).at(0.0, 0.01)
        assert stream.limit == pytest.approx(1.491825, rel=1e-6)
        assert stream.see(100.0) == pytest.approx(1.491825, rel=1e-6)
        assert first(stream.state.mu_U) == pytest.approx(0.004)
        assert math.sqrt(first(stream.state.v_U)) == pytest.approx(0.107163, rel=1e-5)
        assert stream.limit == pytest.approx(1.541342, rel=1e-6)

    @pytest.mark.parametrize(("norm", "becomes"), [(3, 1.78125), (6, 1.3125), (51, 1.03125)])
    def test_zclip(self, library, norm, becomes):
        stream = Stream(ZCLIP, library=library).at(1.0, 0.25)
        assert stream.see(norm) == pytest.approx(becomes, rel=1e-12)
        if norm == 3:
            assert first(stream.state.mu_U) == pytest.approx(1.0234375, rel=1e-12)
            assert first(stream.state.v_U) == pytest.approx(0.25972839, rel=1e-7)

    @pytest.mark.parametrize(
        ("ratio", "decay", "coef", "gamma"),
        [(1.05, 0.98, 0.35, 1.001), (1.04, 0.99, 0.346667, 1.0004)],
    )
    def test_adagc(self, library, ratio, decay, coef, gamma):
        statistic = StatisticLimit(ratio=ratio, decay=decay, learn="clipped")
        stream = Stream(statistic, library=library).at(1.0, 0.0)
        assert stream.see(3.0) / 3.0 == pytest.approx(coef, abs=1e-6)
        assert first(stream.state.mu_U) == pytest.approx(gamma, rel=1e-12)

    def test_autoclip(self, library):
        stream = Stream(AUTOCLIP)
        stream.play(range(1, 11))
        assert stream.limit == pytest.approx(1.9, rel=1e-12)


def test_a_history_of_everything_grows_and_equals_numpy():
    norms = np.random.default_rng(0).lognormal(size=700)
    limits = Stream(AUTOCLIP).play(norms)
    for step in (1, 10, 255, 256, 257, 600, 699):
        assert limits[step] == pytest.approx(np.percentile(norms[:step], 10), rel=1e-12)


def test_a_window_is_measured_anew_and_excludes_the_step_itself():
    norms = np.random.default_rng(1).lognormal(size=400)
    limits = Stream(SKIPSTEP).play(norms)
    for step in (64, 100, 128, 129, 300):
        last = norms[max(0, step - 128) : step]
        assert limits[step] == pytest.approx(last.mean() + 6 * last.std(ddof=1), rel=1e-12)
    assert limits[63] == math.inf


def test_while_it_warms_up_there_is_no_limit_or_the_one_that_is_given():
    norms = [1.0] * 200
    assert Stream(DEFAULT).play(norms)[:101] == pytest.approx([math.inf] * 100 + [math.exp(0.2)])
    assert Stream(EVERY["adagc"]).play(norms)[:101] == pytest.approx([1.0] * 100 + [1.04])


def test_a_start_up_transient_does_not_linger():
    """10 times over 50 steps: the limit at step 101 is below 2 times the level."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        norms = np.exp(0.1 * draw.standard_normal(101))
        norms[:50] *= np.geomspace(10, 1, 50)
        assert Stream(DEFAULT).play([*norms, 1.0])[-1] < 2


def test_a_spike_is_contained_and_a_new_level_is_accepted():
    draw = np.random.default_rng(3)
    stream = Stream(DEFAULT)
    stream.play(np.exp(0.1 * draw.standard_normal(300)))
    assert stream.see(100.0) < 2
    limits = stream.play(10 * np.exp(0.1 * draw.standard_normal(60)))
    assert next(i for i, limit in enumerate(limits) if limit > 10) < 40


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=12)
@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0]),
    at=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_a_norm_that_says_nothing_changes_nothing_later(name, bad, at, seed):
    norms = np.random.default_rng(seed).lognormal(sigma=0.3, size=201).tolist()
    clean, dirty = Stream(EVERY[name]), Stream(EVERY[name])
    expected = clean.play(norms)
    found = dirty.play([*norms[:at], bad, *norms[at:]])
    assert found[:at] + found[at + 1 :] == expected


@pytest.mark.parametrize("name", EVERY)
def test_a_step_that_is_not_usable_changes_nothing(name):
    stream = Stream(EVERY[name], units=2)
    for norm in np.random.default_rng(0).lognormal(size=150):
        stream.see(norm, 2 * norm)
    before = {key: np.array(values) for key, values in stream.state.arrays().items()}
    stream.see(5.0, math.nan, usable=False)
    for key, values in stream.state.arrays().items():
        assert np.array_equal(values, before[key])


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("adagc", "bounded")])
@settings(max_examples=12)
@given(power=st.integers(-20, 20), seed=st.integers(0, 99))
def test_scaling_every_norm_scales_every_limit(name, power, seed):
    norms = np.random.default_rng(seed).lognormal(sigma=0.3, size=160)
    norms[140] *= 50
    gain = 2.0**power  # 1e-6 to 1e6, exact in binary
    scaled = Stream(EVERY[name]).play(norms * gain)
    np.testing.assert_allclose(scaled, np.array(Stream(EVERY[name]).play(norms)) * gain, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "autoclip"])
def test_torch_and_numpy_learn_alike(name):
    norms = np.random.default_rng(5).lognormal(sigma=0.3, size=220)
    norms[::37] *= 40
    ours = Stream(EVERY[name], library="torch").play(norms)
    np.testing.assert_allclose(ours, Stream(EVERY[name]).play(norms), rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_plain_numbers_learn_as_arrays_do(name):
    norms = np.random.default_rng(7).lognormal(sigma=0.3, size=400)
    norms[::37] *= 40
    norms[[50, 150, 250]] = math.nan, 0.0, 1e200
    ours = Stream(EVERY[name], library="numbers").play(norms)
    np.testing.assert_allclose(ours, Stream(EVERY[name]).play(norms), rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_units_learn_for_themselves(name):
    norms = np.random.default_rng(6).lognormal(sigma=0.3, size=(150, 3))
    together = Stream(EVERY[name], units=3)
    alone = [Stream(EVERY[name]) for _ in range(3)]
    for step in norms:
        found = np.array(together.found.limit_U)
        assert found.tolist() == [one.limit for one in alone]
        together.see(*step)
        for one, norm in zip(alone, step, strict=True):
            one.see(norm)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "autoclip"])
def test_learning_reads_nothing_from_a_device(name):
    meta = TorchArrays(torch.device("meta"))
    state = begun(EVERY[name], 2, meta)
    norms_U = torch.empty(2, device="meta")
    found = bounds(EVERY[name], state, meta)
    goal(EVERY[name], found, meta.to_doubles(norms_U), meta)
    usable = torch.isfinite(norms_U[0])
    after = learned(EVERY[name], state, found, meta.to_doubles(norms_U), usable, meta)
    assert {values.device.type for values in after.arrays().values()} == {"meta"}
