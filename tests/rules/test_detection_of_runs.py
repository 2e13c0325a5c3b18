"""What the loss, the loss scale, single parameters and the run as one show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.policy import KINDS, Detect
from gradwatch.policy.detectors import Stuck
from gradwatch.records import Layout, Parameter, StepRecord
from gradwatch.rules.detect_silence import Silence

NAN = float("nan")


def only(kind, **parameters):
    """One detector alone."""
    rest = dict.fromkeys(set(KINDS) - {kind})
    return Detect(**rest, **({kind: parameters} if parameters else {}))


def seen(anomalies):
    return [(a.kind, a.level, a.step) for a in anomalies]


def losses(steps, *, seed=0, sigma=0.03, falls=0.002, start=3.0):
    draw = np.random.default_rng(seed)
    return start * np.exp(-falls * np.arange(steps) + sigma * draw.standard_normal(steps))


class Stream:
    """Plays one column of a run, with healthy norms beside it."""

    def __init__(self, run, kind, **parameters):
        self.run = run(1, config=only(kind, **parameters))

    def play(self, values, name="loss", **fields):
        found = []
        for value in values:
            scalars = {"loss": float(value)} if name == "loss" else {}
            more = {} if name == "loss" else {name: value}
            norm = np.exp(0.2 * np.random.default_rng(self.run.step).standard_normal((1, 1)))
            found += self.run.play(norm, scalars=scalars, **more, **fields)
        return found


class TestLossSpike:
    def test_a_loss_that_stays_up_is_an_alert_at_the_third_step(self, run):
        stream = Stream(run, "loss_spike")
        assert stream.play(losses(200)) == []
        (found,) = stream.play(2 * losses(10, seed=1, start=2.0))
        assert (found.kind, found.level, found.step) == ("loss_spike", "alert", 202)
        assert found.message.startswith("loss_spike: the loss ")
        assert found.message.endswith("since step 200")

    @pytest.mark.parametrize("seed", range(5))
    def test_one_bad_batch_is_none(self, run, seed):
        values = losses(400, seed=seed)
        values[[200, 260, 320]] *= 3
        assert Stream(run, "loss_spike").play(values) == []

    def test_ten_percent_more_is_healthy(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200, sigma=0.001, falls=0))
        assert stream.play(1.09 * losses(20, sigma=0.001, falls=0)) == []

    @pytest.mark.parametrize("bad", [NAN, math.inf, 0.0, -1.0])
    def test_a_loss_without_a_logarithm_is_passed_over_and_hides_nothing(self, run, bad):
        stream = Stream(run, "loss_spike")
        stream.play([*losses(200), bad])
        assert seen(stream.play(2 * losses(4, start=2.0))) == [("loss_spike", "alert", 203)]

    def test_without_a_loss_nothing_is_said(self, run):
        assert run(1, config=only("loss_spike")).play(np.ones((300, 1))) == []

    def test_a_raised_learning_rate_may_raise_the_loss(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200), learning_rate=1e-4)
        assert stream.play(2 * losses(60, start=2.0), learning_rate=1e-2) == []

    def test_a_loss_that_comes_down_after_a_raised_learning_rate_is_no_spike(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200, falls=0), learning_rate=0.05)
        up = 3 * np.exp(math.log(40) * np.exp(-np.arange(300) / 40))
        assert stream.play(up[:4], learning_rate=5.0) == []
        assert stream.play(up[4:], learning_rate=0.05) == []

    def test_what_is_usual_is_learnt_anew_after_a_raised_learning_rate(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200, falls=0, start=2.0), learning_rate=1e-3)
        assert stream.play(losses(150, falls=0, start=4.0), learning_rate=1e-2) == []
        assert seen(stream.play(losses(10, falls=0, start=8.0), learning_rate=1e-2)) == [
            ("loss_spike", "alert", 352)
        ]

    def test_a_hundred_times_its_median_is_an_alert_also_after_a_raised_learning_rate(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200, falls=0), learning_rate=0.05)
        found = stream.play(120 * losses(10, falls=0), learning_rate=5.0)
        assert seen(found) == [("loss_spike", "alert", 202)]

    def test_it_ends_when_the_loss_is_back_and_may_come_again(self, run):
        stream = Stream(run, "loss_spike")
        stream.play(losses(200, falls=0))
        stream.play(2 * losses(10, falls=0))
        assert stream.run.detection.active() == {"loss_spike": ()}
        stream.play(losses(20, falls=0))
        assert stream.run.detection.active() == {}
        assert seen(stream.play(2 * losses(10, falls=0))) == [("loss_spike", "alert", 232)]


class TestDiverging:
    def test_a_median_above_the_best_one_is_a_warning(self, run):
        stream = Stream(run, "diverging")
        stream.play(losses(400))
        found = stream.play(np.linspace(1.35, 2.7, 300))
        assert [(a.kind, a.level) for a in found] == [("diverging", "warning")]
        assert found[0].step < 550
        assert "the median of 50 losses" in found[0].message

    def test_noise_near_zero_is_none(self, run):
        draw = np.random.default_rng(0)
        fall = 3 * np.exp(-0.02 * np.arange(300))
        floor = 0.01 * np.exp(0.7 * draw.standard_normal(700))
        assert Stream(run, "diverging").play(np.concatenate([fall, floor])) == []

    def test_a_plateau_is_healthy(self, run):
        assert Stream(run, "diverging").play(losses(1500, falls=0, sigma=0.2)) == []


class TestLossScale:
    def play(self, run, *parts):
        stream = Stream(run, "loss_scale_collapse")
        found = []
        for scale, dropped in parts:
            fields = {"skipped": "overflow"} if dropped else {}
            found += stream.play([scale], "loss_scale", **fields)
        return found

    def test_the_search_at_the_beginning_is_healthy(self, run):
        search = [(2.0**k, True) for k in range(40, 10, -1)]
        assert self.play(run, *search, *[(2.0**10, False)] * 200) == []

    def test_a_scale_below_one_is_an_alert(self, run):
        search = [(2.0**k, True) for k in range(16, -3, -1)]
        (found,) = self.play(run, *search)
        assert (found.level, found.step, found.value) == ("alert", 17, 0.5)

    def test_eight_halvings_once_it_was_found_are_an_alert(self, run):
        parts = [(2.0**16, False)] * 100
        for k in range(16, 7, -1):
            parts += [(2.0**k, True), *[(2.0**k, False)] * 4]
        found = self.play(run, *parts)
        assert [a.kind for a in found] == ["loss_scale_collapse"]
        assert "halved 8 times in 64 steps" in found[0].message

    def test_one_overflow_in_two_thousand_steps_is_how_it_works(self, run):
        parts = []
        for _ in range(5):
            parts += [(2.0**16, False)] * 100 + [(2.0**17, True)]
        assert self.play(run, *parts) == []

    def test_a_third_of_all_steps_dropped_is_an_alert(self, run):
        parts = [(1024.0, k % 3 == 0) for k in range(200)]
        found = self.play(run, *parts)
        assert [a.kind for a in found] == ["loss_scale_collapse"]
        assert "of the last 64 steps were dropped" in found[0].message

    def test_a_run_without_a_scale_has_none_to_lose(self, run):
        assert self.play(run, *[(NAN, False)] * 300) == []


class TestCollapsed:
    def test_a_parameter_that_falls_far_is_an_alert_and_the_others_are_not_named(
        self, run, healthy
    ):
        a_run = run(3, config=only("collapsed"))
        a_run.warm(160)
        norms = healthy(40, 3, seed=1)
        norms[:, 1] *= 1e-4
        (found,) = a_run.play(norms)
        assert (found.level, found.step, found.layers) == ("alert", 179, ("block.1.weight",))

    def test_it_is_judged_by_parameter_where_its_layer_hides_it(self, run, healthy):
        names = [("a.weight", (4, 4)), ("a.bias", (4,))]
        layout = Layout.of([Parameter(name=name, shape=shape) for name, shape in names])
        a_run = run(layout, config=only("collapsed"))
        assert a_run.play(healthy(160, 2)) == []
        norms = healthy(40, 2, seed=1)
        norms[:, 1] = 0.0
        assert a_run.play(norms)[0].layers == ("a.bias",)

    def test_a_norm_that_falls_with_the_loss_is_healthy(self, run, healthy):
        a_run = run(2, config=only("collapsed"))
        a_run.play(healthy(160, 2), scalars={"loss": 2.0})
        assert a_run.play(healthy(60, 2, median=1e-4), scalars={"loss": 2e-4}) == []
        assert a_run.play(healthy(60, 2, median=1e-4), scalars={"loss": 0.0}) == []

    def test_a_slow_fall_is_healthy(self, run, healthy):
        fall = 10.0 ** -(np.arange(1500) / 300)[:, None]
        assert run(2, config=only("collapsed")).play(healthy(1500, 2) * fall) == []

    def test_a_layer_that_rests_for_some_steps_is_healthy(self, run, healthy):
        a_run = run(2, config=only("collapsed"))
        a_run.warm(160)
        norms = healthy(200, 2, seed=1)
        norms[::2, 0] *= 1e-6
        assert a_run.play(norms) == []


class TestUnused:
    def layout(self, trainable):
        return Layout.of(
            [Parameter(name="a.weight"), Parameter(name="b.weight", trainable=trainable)]
        )

    def test_a_parameter_without_a_gradient_is_a_warning_once(self, run, healthy):
        a_run = run(self.layout(True), config=only("unused"))
        absent = np.array([True, False])
        (found,) = a_run.play(healthy(300, 2), present_P=absent)
        assert (found.level, found.step, found.layers) == ("warning", 99, ("b.weight",))
        assert found.message == "unused: layer b.weight: no gradient in 100 steps, since step 0"

    def test_one_that_rests_between_is_healthy(self, run, healthy):
        a_run = run(self.layout(True), config=only("unused"))

        def present(step):
            return np.array([True, step % 90 == 0])

        assert a_run.play(healthy(500, 2), present_P=present) == []

    def test_a_frozen_one_is_meant_to_have_none(self, run, healthy):
        a_run = run(self.layout(False), config=only("unused"))
        assert a_run.play(healthy(300, 2), present_P=np.array([True, False])) == []


class TestStuck:
    def test_the_same_norm_to_the_bit_in_twenty_steps_is_a_warning(self, run, healthy):
        a_run = run(2, config=only("stuck"))
        a_run.play(healthy(50, 2))
        (found,) = a_run.play(np.ones((60, 2)))
        assert (found.level, found.step) == ("warning", 70)

    def test_a_total_that_is_the_same_of_layers_that_differ_is_not_stuck(self, run):
        angles = np.arange(100)[:, None]
        norms = np.abs(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
        assert run(2, config=only("stuck")).play(norms, total_norm=1.0) == []

    def test_nearly_the_same_is_healthy(self, run):
        norms = 1 + 1e-6 * np.arange(100)[:, None]
        assert run(1, config=only("stuck")).play(norms) == []


class TestClippedElsewhere:
    def clipped(self, norms, limit=1.0, epsilon=1e-6):
        """As `clip_grad_norm_` leaves them."""
        total = np.linalg.norm(norms, axis=1, keepdims=True)
        return norms * np.minimum(1.0, limit / (total + epsilon))

    @pytest.mark.parametrize("limit", [1e-3, 0.5, 1.0, 100.0])
    def test_a_total_at_a_limit_while_the_layers_differ_is_a_warning_once(
        self, run, healthy, limit
    ):
        a_run = run(3, config=only("clipped_elsewhere"))
        (found,) = a_run.play(self.clipped(200 * limit * healthy(300, 3), limit))
        assert (found.kind, found.level, found.step) == ("clipped_elsewhere", "warning", 4)
        assert found.value == pytest.approx(limit, rel=1e-3)
        assert found.message == (
            f"clipped_elsewhere: the total norm is {found.value:.6g} in 4 steps and never more, "
            "while the layers differ: something clips the gradient before gradwatch measures it "
            "(take clip_grad_norm_, or the trainer's clipping, out of the loop), since step 1"
        )

    def test_one_step_in_fifty_at_the_limit_is_enough(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        norms = healthy(1000, 3)
        limit = np.quantile(np.linalg.norm(norms, axis=1), 0.98)
        assert len(a_run.play(self.clipped(norms, limit))) == 1

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 0.2, 2.0])
    def test_a_gradient_that_nobody_clips_is_healthy(self, run, healthy, seed, sigma):
        a_run = run(3, config=only("clipped_elsewhere"))
        assert a_run.play(healthy(2000, 3, seed=seed, sigma=sigma)) == []

    def test_a_gradient_at_rest_is_healthy(self, run):
        a_run = run(2, config=only("clipped_elsewhere"))
        assert a_run.play(np.ones((100, 2))) == []
        drift = 1 - 1e-8 * np.arange(100)[:, None] * np.array([1.0, 2.0])
        assert a_run.play(drift) == []

    def test_a_norm_that_swings_smoothly_is_healthy(self, run):
        a_run = run(2, config=only("clipped_elsewhere"))
        for period in (3, 7, 40, 400, 4000):
            turn = 2 * math.pi * np.arange(2000) / period
            norms = np.stack([2 + np.sin(turn), 2 + np.sin(turn + 1)], axis=1)
            assert a_run.play(norms) == []

    def test_a_norm_above_the_limit_ends_it(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        assert len(a_run.play(self.clipped(10 * healthy(100, 3)))) == 1
        assert a_run.play(10 * healthy(100, 3)) == []
        assert len(a_run.play(self.clipped(10 * healthy(400, 3)))) == 1

    def test_a_limit_that_is_raised_again_and_again_is_told_once(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        found = []
        for limit in np.linspace(1.0, 3.0, 40):
            found += a_run.play(self.clipped(100 * healthy(20, 3), limit))
        assert len(found) == 1

    def test_steps_at_a_limit_that_was_lower_count_no_more(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        assert a_run.play(self.clipped(100 * healthy(4, 3))) == []
        assert a_run.play(self.clipped(100 * healthy(4, 3, seed=1), limit=5.0)) == []
        (found,) = a_run.play(self.clipped(100 * healthy(1, 3, seed=2), limit=5.0))
        assert "the total norm is 5 in 4 steps" in found.message
        assert found.message.endswith("since step 5")

    def test_steps_that_are_not_finite_hide_nothing(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        norms = self.clipped(10 * healthy(40, 3))
        norms[::3] = NAN
        assert [a.kind for a in a_run.play(norms)] == ["clipped_elsewhere"]

    def test_what_was_clipped_before_it_was_unscaled_is_said(self, run, healthy):
        a_run = run(3, config=only("clipped_elsewhere"))
        scale = 65536.0
        norms = self.clipped(scale * healthy(20, 3)) / scale
        (found,) = a_run.play(norms, loss_scale=scale)
        assert (
            "the total norm is 1.52588e-05 (1 before scaler.unscale_) in 4 steps" in found.message
        )
        (other,) = run(3, config=only("clipped_elsewhere")).play(
            self.clipped(10 * healthy(20, 3)), loss_scale=scale
        )
        assert "the total norm is 1 in 4 steps" in other.message


class TestClipSaturated:
    def play(self, run, clipped):
        stream = Stream(run, "clip_saturated")
        return stream.play(clipped, "clipped", limits={"global": 1.0})

    def test_clipping_in_every_step_is_an_event_once(self, run):
        (found,) = self.play(run, [True] * 600)
        assert (found.kind, found.level, found.step) == ("clip_saturated", "event", 255)

    def test_clipping_in_nine_of_ten_is_healthy(self, run):
        assert self.play(run, [k % 10 != 0 for k in range(600)]) == []


def test_a_detector_looks_at_the_layers_that_it_is_told(run, healthy):
    norms = healthy(200, 3)
    norms[170:, 0] *= 100
    for chosen, kinds in (
        ({}, {"exploding", "spike"}),
        ({"layers": "block.[12]"}, {"spike"}),
        ({"exclude": "block.0"}, {"spike"}),
    ):
        found = {a.kind for a in run(3, config=Detect(exploding=chosen)).play(norms)}
        assert found == kinds


class TestSilence:
    def steps(self, layout, seconds, *, count=10):
        norms = np.ones(1, dtype=np.float32)
        return [
            StepRecord(
                step=step, time=0.0, layout=layout, total_norm=1.0, total_norm_clipped=1.0,
                tensor_norms_P=norms, tensor_coefs_P=norms, present_P=norms > 0,
                duration_seconds=seconds,
            )
            for step in range(count)
        ]  # fmt: skip

    def test_five_minutes_without_a_step_are_a_warning_once(self, layers_named):
        silence = Silence(Stuck(), 0.0)
        silence.seen(self.steps(layers_named("a"), 2.0), 100.0)
        assert silence.look(399.0) is None
        found = silence.look(401.0)
        assert (found.kind, found.level, found.step) == ("stuck", "warning", 9)
        assert found.message == "stuck: no step in 301 s since step 9, where one takes 2 s"
        assert silence.look(9999.0) is None
        silence.seen(self.steps(layers_named("a"), 2.0), 10_000.0)
        assert silence.look(10_400.0) is not None

    def test_a_run_of_slow_steps_is_given_ten_of_them(self, layers_named):
        silence = Silence(Stuck(), 0.0)
        silence.seen(self.steps(layers_named("a"), 60.0), 0.0)
        assert silence.look(599.0) is None
        assert silence.look(601.0) is not None

    def test_a_hook_that_never_fires_is_told_from_a_run_that_rests(self):
        silence = Silence(Stuck(seconds=10), 0.0)
        assert "is step() of the watched optimizer called?" in silence.look(11.0).message

    def test_it_can_be_switched_off(self):
        assert Silence(None, 0.0).look(1e9) is None
