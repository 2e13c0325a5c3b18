"""What the sampled steps show: zeros, updates, lost precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.policy import KINDS, Detect
from gradwatch.records import SAMPLES, Layout, Parameter
from gradwatch.rules.detect_sampled import samples_every

HEALTHY = {
    "zero_share": 0.5, "flushed_share": 0.1, "unchanged_share": 0.0, "update_norm": 1e-3,
    "weight_norm": 1.0,
}  # fmt: skip


def only(kind, **parameters):
    rest = dict.fromkeys(set(KINDS) - {kind})
    return Detect(**rest, **({kind: parameters} if parameters else {}))


class Stream:
    """A run of two layers, the first of which is given what it shows; every step is sampled."""

    def __init__(self, run, kind, module="Linear", **parameters):
        names = ("a.weight", "b.weight")
        layout = Layout.of([Parameter(name=n, shape=(4, 4), module=module) for n in names])
        self.run = run(layout, config=only(kind, **parameters))

    def play(self, steps, *, sampled=True, rate=1e-3, **first):
        samples = {
            name: np.array([first.get(name, HEALTHY[name]), HEALTHY[name]], dtype=np.float32)
            for name in SAMPLES
        }
        norms = np.exp(0.2 * np.random.default_rng(self.run.step).standard_normal((steps, 2)))
        fields = {"samples": samples} if sampled else {}
        return self.run.play(norms, learning_rate=rate, **fields)


PROVOKED = {
    "dead": ({"zero_share": 1.0}, "alert", 19),
    "stalled_update": ({"update_norm": 1e-9}, "alert", 49),
    "oversized_update": ({"update_norm": 0.5}, "alert", 2),
    "underflow": ({"flushed_share": 0.6}, "warning", 19),
    "swallowed_update": ({"unchanged_share": 0.8}, "warning", 19),
}
TWINS = {
    "dead": {"zero_share": 0.99},
    "stalled_update": {"update_norm": 1e-6},
    "oversized_update": {"update_norm": 0.2},
    "underflow": {"flushed_share": 0.3},
    "swallowed_update": {"unchanged_share": 0.4},
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_each_kind_catches_its_provocation_once_and_names_the_layer(run, kind):
    stream = Stream(run, kind)
    assert stream.play(40) == []
    shown, level, after = PROVOKED[kind]
    (found,) = stream.play(80, **shown)
    assert (found.kind, found.level, found.step) == (kind, level, 40 + after)
    assert (found.layer, found.layers) == ("a", ("a",))
    assert found.message.startswith(f"{kind}: layer a: ")
    assert found.message.endswith("since step 40")


@pytest.mark.parametrize("kind", PROVOKED)
def test_each_kind_is_silent_on_the_healthy_twin_and_without_samples(run, kind):
    stream = Stream(run, kind)
    assert stream.play(40) == []
    assert stream.play(200, **TWINS[kind]) == []
    assert stream.play(200, sampled=False) == []
    unknown = dict.fromkeys(SAMPLES, math.nan)
    assert stream.play(200, **unknown) == []


@pytest.mark.parametrize("kind", ["dead", "stalled_update", "oversized_update"])
def test_it_ends_when_the_layer_is_well_again(run, kind):
    stream = Stream(run, kind)
    stream.play(100, **PROVOKED[kind][0])
    assert stream.run.detection.active() == {kind: ("a",)}
    stream.play(100)
    assert stream.run.detection.active() == {}


@pytest.mark.parametrize("kind", ["stalled_update", "swallowed_update"])
def test_an_update_that_is_meant_to_be_small_is_healthy(run, kind):
    stream = Stream(run, kind)
    stream.play(40, rate=1e-3)
    assert stream.play(200, rate=1e-6, **PROVOKED[kind][0]) == []
    assert stream.play(200, rate=0.0, **PROVOKED[kind][0]) == []


def test_an_embedding_is_mostly_zero_by_its_nature(run):
    assert Stream(run, "dead", module="Embedding").play(200, zero_share=1.0) == []


def test_weights_near_zero_may_grow_at_once(run):
    stream = Stream(run, "oversized_update")
    assert stream.play(50, weight_norm=1e-4, update_norm=1e-3) == []


def test_lost_precision_is_told_beside_the_median_of_the_layer(run):
    stream = Stream(run, "underflow")
    stream.play(300, flushed_share=0.1)
    (found,) = stream.play(100, flushed_share=0.6)
    assert "60% of its gradient is zero or too small for float16" in found.message
    assert "where its median is 10%, since step" in found.message


def test_a_share_that_was_high_from_the_start_is_usual(run):
    stream = Stream(run, "underflow")
    assert stream.play(300, flushed_share=0.8) == []


def test_a_lasting_loss_does_not_become_usual(run):
    stream = Stream(run, "underflow")
    stream.play(40)
    stream.play(1500, flushed_share=0.6)
    assert stream.run.detection._detectors["underflow"]._episodes.open_L.tolist() == [True, False]


def test_samples_are_taken_where_somebody_needs_them():
    assert samples_every(Detect()) == 10
    assert samples_every(Detect(every=3)) == 3
    assert samples_every(only("spike")) == 0


def test_a_saved_state_goes_on(run):
    whole, first, second = (Stream(run, "underflow") for _ in range(3))
    for stream in (whole, first):
        stream.play(60)
    second.run.detection.load_state_dict(first.run.detection.state_dict())
    second.run.step = 60
    shown = PROVOKED["underflow"][0]
    assert second.play(30, **shown) == whole.play(30, **shown) != []
