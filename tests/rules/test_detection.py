"""Each detector catches its provocation, stays silent on the healthy twin, and says so once."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.policy import KINDS, Detect
from gradwatch.policy.detectors import Exploding, Spike, Vanishing
from gradwatch.records import Layout, Parameter
from gradwatch.rules.detection import Detection

NAN, INF = float("nan"), float("inf")
OLDEST = ("nonfinite", "overflow", "exploding", "spike", "vanishing")
"""The kinds of this file; each of the others is off."""


def only(**config):
    return Detect(**{**dict.fromkeys(set(KINDS) - set(OLDEST)), **config})


@pytest.fixture
def run(run):
    def make(of=3, **config):
        return run(of, **{"config": only(), **config})

    return make


def seen(anomalies, *levels):
    """(kind, level, step) of anomalies, of some levels only."""
    return [(a.kind, a.level, a.step) for a in anomalies if not levels or a.level in levels]


def times(norms, layer, factor):
    norms = norms.copy()
    norms[:, layer] *= factor
    return norms


# exploding and spike


def test_a_layer_that_stays_far_above_its_median_is_an_alert_at_the_third_step(run, healthy):
    a_run = run(3)
    a_run.warm(160)
    anomalies = a_run.play(times(healthy(40, seed=1), 1, 50.0))
    assert seen(anomalies) == [("spike", "event", 160), ("exploding", "alert", 162)]
    alert = anomalies[1]
    assert alert.layer == "block.1"
    assert alert.layers == ("block.1",)
    assert a_run.detection.active() == {"exploding": ("block.1",)}


def test_a_layer_that_doubles_is_healthy(run, healthy):
    a_run = run(3)
    a_run.warm(160)
    assert a_run.play(times(healthy(200, seed=1), 1, 2.0)) == []


def test_one_step_far_above_the_median_is_an_event_and_pages_nobody(run, healthy):
    a_run = run(3)
    a_run.warm(160)
    anomalies = a_run.play(times(healthy(1, seed=1), 2, 10.0)) + a_run.play(healthy(100, seed=2))
    assert seen(anomalies) == [("spike", "event", 160)]
    assert a_run.detection.active() == {}


def test_two_outliers_in_five_steps_are_no_alert_and_three_are(run, healthy):
    for high, kinds in (([0, 4], ["spike", "spike"]), ([0, 2, 4], ["spike", "spike", "exploding"])):
        a_run = run(1)
        a_run.warm(160)
        norms = np.ones((30, 1))
        norms[high] = 30.0
        assert [a.kind for a in a_run.play(norms)] == kinds


def test_the_message_says_which_layer_how_far_and_since_when(run):
    a_run = run(6)
    flat = np.full((160, 6), 1.25)
    flat[1::2] *= 1.0001
    a_run.play(flat)
    burst = np.full((3, 6), 1.25)
    burst[:, 1:] = [[800.0, 10.0, 11.0, 12.0, 13.0]] * 3
    alert = a_run.play(burst)[-1]
    assert alert.message == (
        "exploding: layer block.1 and 4 more: gradient norm 800 is 640x its median 1.25 "
        "since step 160"
    )
    assert alert.value == 800.0
    assert alert.expected == pytest.approx(1.25, rel=1e-3)


def test_the_worst_layers_are_named_worst_first_and_the_rest_counted(run, healthy):
    a_run = run(9)
    a_run.warm(160)
    norms = np.ones((4, 9)) * [1, 10, 100, 1000, 20, 30, 40, 50, 60]
    alert = a_run.play(norms)[-1]
    assert alert.layers == tuple(f"block.{i}" for i in (3, 2, 8, 7, 6))
    assert "and 7 more" in alert.message
    assert a_run.detection.active()["exploding"] == tuple(
        f"block.{i}" for i in (3, 2, 8, 7, 6, 5, 4, 1)
    )


def test_layers_that_follow_the_first_one_are_active_without_a_second_alert(run):
    a_run = run(5)
    a_run.warm(160)
    norms = np.ones((60, 5))
    for layer in range(5):
        norms[2 * layer :, layer] = 40.0
    assert seen(a_run.play(norms), "alert") == [("exploding", "alert", 162)]
    assert len(a_run.detection.active()["exploding"]) == 5


def test_a_layer_that_joins_much_later_is_reported(run):
    a_run = run(2)
    a_run.warm(160)
    norms = np.ones((200, 2))
    norms[:, 0] = 40.0
    norms[100:, 1] = 40.0
    alerts = [a for a in a_run.play(norms) if a.level == "alert"]
    assert [(a.step, a.layers) for a in alerts] == [(162, ("block.0",)), (262, ("block.1",))]


@pytest.mark.parametrize("factor", [10.0, 1e2, 1e4, 1e6])
def test_a_sustained_explosion_stays_open_and_is_accepted_after_2000_steps(run, healthy, factor):
    a_run = run(2, config=only(vanishing=None))
    a_run.warm(160)
    high = times(healthy(2100, 2, seed=3), 0, factor)
    anomalies = a_run.play(high[:1900])
    assert seen(anomalies) == [("spike", "event", 160), ("exploding", "alert", 162)]
    assert a_run.detection.active() == {"exploding": ("block.0",)}

    (rebaselined,) = a_run.play(high[1900:])
    assert (rebaselined.kind, rebaselined.level) == ("exploding", "event")
    assert rebaselined.step == 162 + 2000
    assert "rebaselined" in rebaselined.message
    assert a_run.detection.active() == {}

    assert a_run.play(times(healthy(300, 2, seed=4), 0, factor)) == []
    worse = a_run.play(times(healthy(20, 2, seed=5), 0, factor * 50))
    assert seen(worse, "alert") == [("exploding", "alert", a_run.step - 18)]


def test_an_episode_ends_after_five_calm_steps_and_not_while_the_norm_hovers(run):
    a_run = run(1)
    a_run.warm(160)
    a_run.play(np.full((5, 1), 100.0))
    a_run.play(np.tile([[1.0], [1.0], [1.0], [1.0], [3.0]], (10, 1)))
    assert a_run.detection.active() == {"exploding": ("block.0",)}
    a_run.play(np.ones((4, 1)))
    assert a_run.detection.active() == {"exploding": ("block.0",)}
    assert a_run.play(np.ones((1, 1))) == []
    assert a_run.detection.active() == {}
    again = a_run.play(np.full((5, 1), 100.0))
    assert seen(again, "alert") == [("exploding", "alert", 222)]


def test_a_burst_during_the_warm_up_is_an_alert_at_a_thousand_times_the_median(run, healthy):
    a_run = run(2)
    assert a_run.play(healthy(10, 2)) == []
    alerts = a_run.play(times(healthy(5, 2, seed=1), 0, 1000.0))
    assert seen(alerts, "alert") == [("exploding", "alert", 12)]


def test_growth_during_the_warm_up_is_healthy(run, healthy):
    a_run = run(2)
    ramp = np.geomspace(0.02, 1.0, 40)[:, None]
    assert a_run.play(healthy(40, 2) * ramp) == []
    assert a_run.play(healthy(200, 2, seed=1)) == []


def test_with_fewer_than_eight_values_nothing_is_far_from_anything(run):
    norms = np.full((100, 1), 1e5)
    norms[:3] = 1.0
    assert run(1).play(norms) == []


def test_a_layer_that_is_rarely_present_is_watched_on_the_steps_that_it_has(run):
    """An expert that is used every tenth step: three of *its* last five steps."""
    a_run = run(2)

    def present(step):
        return np.array([True, step % 10 == 0])

    norms = np.ones((1000, 2)) * np.where(np.arange(1000) % 2, 1.0, 1.001)[:, None]
    norms[np.arange(1000) % 10 != 0, 1] = 0.0
    assert a_run.play(norms, present_P=present) == []
    norms[:, 1] *= 100.0
    alerts = a_run.play(norms[:60], present_P=present)
    assert seen(alerts, "alert") == [("exploding", "alert", 1020)]


def test_a_skipped_step_is_judged_but_teaches_nothing(run, healthy):
    a_run = run(1)
    a_run.warm(160)
    before = a_run.detection.state_dict()
    anomalies = a_run.play(np.full((10, 1), 1e4), skipped="global")
    assert seen(anomalies, "alert") == [("exploding", "alert", 162)]
    after = a_run.detection.state_dict()
    values = "exploding+spike.baseline.values"
    assert after[values].tolist() == before[values].tolist()


def test_repeated_norms_teach_nothing_once_the_baseline_is_warm(run, healthy):
    """A thousand stale records are not a thousand observations of a very steady norm."""
    a_run = run(1)
    a_run.warm(160)
    stale = healthy(1, 1, seed=7)
    before = a_run.detection.state_dict()["exploding+spike.baseline.taken"]
    a_run.play(np.repeat(stale, 100, axis=0))
    after = a_run.detection.state_dict()["exploding+spike.baseline.taken"]
    assert after - before == 1


def test_a_norm_that_never_changes_has_a_baseline_all_the_same(run):
    a_run = run(1)
    assert a_run.play(np.ones((160, 1))) == []
    assert seen(a_run.play(np.full((5, 1), 12.0)), "alert") == [("exploding", "alert", 162)]


def test_a_zero_norm_is_neither_an_outlier_nor_a_value(run, healthy):
    a_run = run(2)
    norms = healthy(200, 2)
    norms[:, 1] = 0.0
    norms[::7, 0] = 0.0
    config = only(vanishing=None)
    a_run = run(2, config=config)
    assert a_run.play(norms) == []
    assert a_run.play(healthy(200, 2, seed=1)) == []
    assert seen(a_run.play(times(healthy(3, 2), 1, 50.0)), "alert") == [("exploding", "alert", 402)]


# nonfinite


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_norm_that_is_not_finite_is_an_alert_at_once_even_at_the_first_step(run, bad):
    a_run = run(3)
    norms = np.ones((20, 3))
    norms[:4, 1] = bad
    alerts = a_run.play(norms[:8])
    assert seen(alerts) == [("nonfinite", "alert", 0)]
    assert alerts[0].layer == "block.1"
    assert a_run.detection.active() == {"nonfinite": ("block.1",)}
    a_run.play(norms[8:9])
    assert a_run.detection.active() == {}


def test_one_report_for_a_series_of_nonfinite_steps_and_another_for_the_next(run):
    a_run = run(2)
    norms = np.ones((40, 2))
    norms[[3, 4, 5, 9, 20], 0] = NAN
    assert seen(a_run.play(norms)) == [("nonfinite", "alert", 3), ("nonfinite", "alert", 20)]


def test_layers_are_listed_in_order_and_none_is_blamed_where_all_are_hit(run):
    some = run(8).play(np.array([[1, NAN, INF, NAN, NAN, NAN, NAN, 1]]))[0]
    assert some.layers == tuple(f"block.{i}" for i in range(1, 6))
    assert "6 of 8 layers" in some.message
    assert "culprit" not in some.message
    everywhere = run(8).play(np.full((1, 8), NAN))[0]
    assert everywhere.layer is None
    assert "gradients cannot name the culprit" in everywhere.message


def test_a_total_norm_that_overflows_alone_is_reported_without_a_layer(run):
    a_run = run(3)
    (alert,) = a_run.play(np.ones((1, 3)), total_norm=INF)
    assert (alert.kind, alert.level, alert.layer, alert.layers) == ("nonfinite", "alert", None, ())
    assert a_run.detection.active() == {"nonfinite": ()}


def test_an_overflow_that_the_loss_scaler_skips_is_an_event(run, healthy):
    a_run = run(2)
    a_run.warm(60)
    fp16 = {"skipped": "overflow", "loss_scale": 65536.0}
    assert seen(a_run.play(np.full((1, 2), INF), **fp16)) == [("overflow", "event", 60)]
    assert a_run.detection.active() == {}


@pytest.mark.parametrize("why", [{"loss_scale": 0.5}, {"scalars": {"loss": NAN}}])
def test_an_overflow_escalates_when_lowering_the_scale_cannot_mend_it(run, why):
    a_run = run(2)
    a_run.warm(60)
    fp16 = {"skipped": "nonfinite", "loss_scale": 2.0}
    anomalies = a_run.play(np.full((3, 2), INF), **fp16)
    anomalies += a_run.play(np.full((3, 2), INF), **{**fp16, **why})
    assert seen(anomalies) == [("overflow", "event", 60), ("nonfinite", "alert", 63)]
    assert a_run.detection.active() == {"nonfinite": ("block.0", "block.1")}


def test_nonfinite_steps_blind_no_other_detector(run, healthy):
    a_run = run(2)
    norms = healthy(400, 2)
    norms[::10] = NAN
    norms[5::20, 0] = INF
    assert {a.kind for a in a_run.play(norms)} == {"nonfinite"}
    spike, alert = (
        a for a in a_run.play(times(healthy(10, 2, seed=1), 1, 20.0)) if a.kind != "nonfinite"
    )
    assert (spike.kind, spike.step) == ("spike", 400)
    assert (alert.kind, alert.step) == ("exploding", 402)


# vanishing


def test_a_layer_with_a_tiny_share_of_the_largest_norm_is_an_alert(run, healthy):
    a_run = run(3)
    anomalies = a_run.play(times(healthy(60), 0, 1e-7))
    assert seen(anomalies) == [("vanishing", "alert", 20 + 19)]
    assert anomalies[0].layer == "block.0"
    assert "x the largest" in anomalies[0].message
    assert a_run.detection.active() == {"vanishing": ("block.0",)}


def test_a_dead_layer_vanishes(run, healthy):
    a_run = run(3)
    a_run.warm(100)
    assert seen(a_run.play(times(healthy(40), 2, 0.0))) == [("vanishing", "alert", 119)]


def test_a_layer_with_a_small_share_is_healthy(run, healthy):
    assert run(3).play(times(healthy(300), 0, 1e-3)) == []


def test_it_takes_twenty_tiny_steps_of_twenty_five(run, healthy):
    for tiny, alerts in ((19, 0), (20, 1)):
        norms = healthy(25)
        norms[:tiny, 0] *= 1e-7
        a_run = run(3)
        a_run.warm(50)
        assert len(a_run.play(norms)) == alerts


def test_a_layer_that_comes_back_ends_its_episode(run, healthy):
    a_run = run(3)
    a_run.play(times(healthy(60), 0, 1e-7))
    a_run.play(healthy(24, seed=1))
    assert "vanishing" in a_run.detection.active()
    a_run.play(healthy(1, seed=2))
    assert "vanishing" not in a_run.detection.active()


def test_a_layer_without_a_gradient_does_not_vanish(run, healthy):
    present = np.array([True, True, False])
    assert run(3).play(times(healthy(300), 2, 0.0), present_P=present) == []


def test_a_run_of_zero_gradients_vanishes_nowhere(run):
    assert run(3).play(np.zeros((100, 3))) == []


def test_the_bias_before_a_normalisation_does_not_vanish_whatever_a_layer_is(run, healthy):
    """Its gradient is zero by construction; its module is well."""
    parameters = [Parameter(name=n) for n in ("conv.weight", "conv.bias", "head.weight")]
    norms = times(healthy(200), 1, 1e-9)
    for grouping in ("module", "parameter"):
        config = only(exploding=None, spike=None)
        assert run(Layout.of(parameters, grouping), config=config).play(norms) == []
    dead = times(norms, 0, 1e-9)
    (alert,) = run(Layout.of(parameters, "parameter")).play(dead[:60])
    assert set(alert.layers) == {"conv.weight", "conv.bias"}


def test_beside_a_layer_that_explodes_the_others_do_not_vanish(run, healthy):
    a_run = run(3)
    a_run.warm(160)
    anomalies = a_run.play(times(healthy(100, seed=1), 0, 1e8))
    assert seen(anomalies, "alert") == [("exploding", "alert", 162)]


# configuration


def test_a_detector_that_is_switched_off_is_silent_and_the_others_are_not(run, healthy):
    norms = np.concatenate([healthy(160), times(healthy(40, seed=1), 0, 1e3)])
    norms[190:, 1] = NAN
    norms[:, 2] *= 1e-8
    overflow = {"skipped": "overflow", "loss_scale": 8.0}

    def kinds(config: Detect) -> set[str]:
        a_run = run(3, config=config)
        found = a_run.play(norms) + a_run.play(healthy(10)) + a_run.play(norms[-1:], **overflow)
        return {anomaly.kind for anomaly in found}

    assert kinds(only()) == set(OLDEST)
    for kind in OLDEST:
        assert kinds(only(**{kind: None})) == set(OLDEST) - {kind}


def test_detectors_with_different_bands_keep_baselines_of_their_own(run, healthy):
    config = only(exploding=Exploding(z=20.0, times=100.0), spike=Spike(window=64))
    a_run = run(2, config=config)
    a_run.warm(160)
    anomalies = a_run.play(times(healthy(20, 2, seed=1), 0, 30.0))
    assert {a.kind for a in anomalies} == {"spike"}


def test_parameters_change_what_is_found(run, healthy):
    config = only(vanishing=Vanishing(share=0.5, need=2, of=2, after=0))
    assert seen(run(2, config=config).play(times(healthy(5, 2, sigma=0.01), 0, 0.4))) == [
        ("vanishing", "alert", 1)
    ]


def test_a_record_of_another_run_is_refused(run, healthy, record, layers_named):
    detection = Detection(layers_named(["a", "b"]))
    detection.observe(record(layers_named(["a", "b"]), 0, [1.0, 1.0]))
    with pytest.raises(ValueError, match=r"2 others \(a, b, \.\.\.\)"):
        detection.observe(record(layers_named(["a", "c"]), 1, [1.0, 1.0]))
