"""The rules on TensorFlow's vectors say what they say on NumPy's, traced and compiled too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from gradwatch.policy import load_policy
from gradwatch.records import Layout, Parameter
from gradwatch.rules.arrays import NUMPY
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import decide
from gradwatch.rules.limits import limit_at
from gradwatch.rules.reading import pack, unpack
from gradwatch.rules.statistics import State
from gradwatch.tensorflow.decisions import _scheduled
from gradwatch.tensorflow.vectors import TFArrays, Vector, tensor_of

LAYOUT = Layout.of(
    [
        Parameter(name=f"{layer}.{name}", shape=(3, 2) if name == "kernel" else (2,))
        for layer in ("in", "middle", "out")
        for name in ("kernel", "bias")
    ]
)
PRESENT = bytes([1] * 6)
POLICIES = {
    "global": [{"limit": 1.0}],
    "per tensor and whole": [{"per": "tensor", "limit": 0.4}, {"limit": 0.7}],
    "per layer": [{"per": "layer", "limit": 0.5, "measure": "rms"}],
    "l1": [{"measure": "l1", "limit": 1.0}],
    "linf": [{"measure": "linf", "limit": 0.5, "params": "in.*"}],
    "l3": [{"measure": "l3", "limit": 0.5, "per": "layer"}],
    "agc": [{"measure": "weight", "per": "tensor", "limit": 0.3}],
    "zero": [{"per": "layer", "limit": 2.0, "then": "zero"}],
    "z": [{"limit": {"z": 2, "warmup": 5}}],
    "z per layer": [{"per": "layer", "limit": {"z": 2, "warmup": 5, "learn": "clipped"}}],
    "z raw, windowed": [{"limit": {"z": 2, "space": "raw", "window": 8, "warmup": 4}}],
    "zclip": [{"limit": {"z": 2.5, "space": "raw", "warmup": 5, "to": "reciprocal"}}],
    "quantile": [{"per": "layer", "limit": {"quantile": 0.7, "window": 7, "warmup": 3}}],
    "ratio": [{"limit": {"ratio": 1.1, "warmup": 2, "to": "mean", "max": 5}}],
    "accepted": [{"limit": {"z": 1, "warmup": 4, "learn": "accepted", "floor": 0.01}}],
}


def steps(count: int = 40) -> list[dict[Any, np.ndarray]]:
    draw = np.random.default_rng(1)
    found = []
    for step in range(count):
        norms = np.exp(draw.normal(0, 0.6, 6)).astype(np.float32)
        if step == 20:
            norms[2] = np.inf
        if step == 21:
            norms[3] = np.nan
        if step == 22:
            norms[:] = 0.0
        keys = {1.0: norms * 2, 3.0: norms * 0.9, np.inf: norms * 0.8}
        found.append({2.0: norms, **keys, "weight": np.full(6, 0.5, np.float32)})
    return found


def on_numpy(chain: Chain, norms: dict[Any, np.ndarray]) -> np.ndarray:
    limits = chain.limits(0)
    decision = decide(chain.rules(PRESENT), norms, limits, NUMPY)
    chain.learn(decision, np.isfinite(decision.total_norm))
    return np.asarray(pack(decision, limits, norms[2.0], None, None, NUMPY))


class OnTensorFlow:
    def __init__(self, chain: Chain, how: str) -> None:
        self._chain = chain
        self._held = {
            k: {n: tf.Variable(np.asarray(v), dtype=tf.float64) for n, v in s.arrays().items()}
            for k, s in chain.histories.items()
        }
        self._step = self._traced
        if how != "eagerly":
            self._step = tf.function(self._traced, jit_compile=how == "xla")
        self._keys: list[Any] = []

    def __call__(self, norms: dict[Any, np.ndarray]) -> np.ndarray:
        self._keys = list(norms)
        return self._step([tf.constant(values) for values in norms.values()]).numpy()

    def _traced(self, values: list[Any]) -> Any:
        xp, chain = TFArrays(), self._chain
        norms = dict(zip(self._keys, map(Vector, values), strict=True))
        chain.histories = {
            k: State.of({name: Vector(v.read_value()) for name, v in held.items()})
            for k, held in self._held.items()
        }
        limits = chain.limits(0)
        decision = decide(chain.rules(PRESENT), norms, limits, xp)
        chain.learn(decision, xp.isfinite(decision.total_norm))
        for k, state in chain.histories.items():
            for name, vector in state.arrays().items():
                self._held[k][name].assign(tensor_of(vector))
        return pack(decision, limits, norms[2.0], None, None, xp).tensor


@pytest.mark.parametrize("how", ["graph", "xla", "eagerly"])
@pytest.mark.parametrize("clip", POLICIES.values(), ids=POLICIES)
def test_a_chain_decides_as_on_numpy(clip, how):
    policy = load_policy({"version": 1, "clip": clip})
    reference = Chain(policy, LAYOUT, NUMPY)
    ours = OnTensorFlow(Chain(policy, LAYOUT, TFArrays()), how)
    for norms in steps():
        expected = unpack(on_numpy(reference, norms), len(clip))
        found = unpack(ours(norms), len(clip))
        assert found.over == expected.over
        np.testing.assert_allclose(found.kept_Q, expected.kept_Q, rtol=3e-7)
        np.testing.assert_allclose(found.limits, expected.limits, rtol=1e-6)
        np.testing.assert_allclose(found.total_norm, expected.total_norm, rtol=3e-7)


def test_a_schedule_in_a_graph_is_the_schedule():
    points = ((0, 10.0), (7, 2.0), (8, 2.0), (20, 5.0))
    at = tf.function(lambda step: _scheduled(points, step).tensor)
    for step in range(-1, 30):
        found = at(tf.constant(step, tf.int64)).numpy()
        assert found == pytest.approx(limit_at(points, step), rel=1e-12)
