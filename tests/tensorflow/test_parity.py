"""The same network, weights and data in torch and in TensorFlow, under the same policies."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import gradwatch

STEPS, WORDS, BATCH = 40, 20, 8
POLICIES = {
    "global": [{"limit": 0.5}],
    "per layer": [{"per": "layer", "limit": 0.2}],
    "agc": [{"per": "tensor", "measure": "weight", "limit": 0.02}],
    "agc of units": [{"per": "unit", "measure": "weight", "limit": 0.02, "exclude": "head*"}],
    "z": [{"limit": {"z": 1, "warmup": 10, "until": 0.5}}],
    "quantile": [{"limit": {"quantile": 0.5, "window": 16, "warmup": 5}}],
    "chain": [{"per": "element", "limit": 0.05}, {"per": "tensor", "limit": 0.2}, {"limit": 0.3}],
}


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, words):
        x = torch.tanh(self.conv(self.embed(words).transpose(1, 2))).mean(2)
        return self.head(x)


def tensorflow_net(like: TorchNet) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(WORDS, 8, name="embed"),
            keras.layers.Conv1D(8, 3, padding="same", activation="tanh", name="conv"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1, name="head"),
        ]
    )
    model.set_weights(in_keras(like))
    return model


def in_keras(net: TorchNet) -> list[np.ndarray]:
    """Its weights as Keras lays them out: kernels the other way round."""
    found = [parameter.detach().numpy().copy() for parameter in net.parameters()]
    return [found[0], found[1].transpose(2, 1, 0), found[2], found[3].T, found[4]]


def data() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    words = draw.integers(0, WORDS, (STEPS, BATCH, 6))
    spread = np.exp(draw.normal(0, 0.5, (STEPS, 1, 1)))
    return words, (1 + spread * draw.standard_normal((STEPS, BATCH, 1))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "graph") for name in POLICIES),
        *((name, "xla") for name in ("agc of units", "chain", "z")),
    ],
)
def test_coefs_and_weights_are_the_same(name, how, attach):
    policy = {"version": 1, "clip": POLICIES[name]}
    torch.manual_seed(0)
    net = TorchNet()
    net.embed.weight.data *= 0.2  # of the size of the other weights
    model = tensorflow_net(net)
    words, targets = data()

    theirs = torch.optim.SGD(net.parameters(), lr=0.02)
    watch = attach(net, theirs, policy=policy)
    for x, y in zip(words, targets, strict=True):
        loss = ((net(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()

    ours = keras.optimizers.SGD(0.02)
    twin = attach(model, ours, policy=policy)

    @tf.function(jit_compile=how == "xla")
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        ours.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for x, y in zip(words, targets, strict=True):
        step(tf.constant(x, tf.int32), tf.constant(y))

    pairs = records(watch), records(twin)
    assert len(pairs[0]) == STEPS
    assert any(record.clipped for record in pairs[0])
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(one.tensor_coefs_P, other.tensor_coefs_P, atol=1e-6)
        assert one.fired == other.fired
        assert one.total_norm == pytest.approx(other.total_norm, rel=2e-6)
    for one, other in zip(in_keras(net), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def records(watch: gradwatch.Watch) -> list[gradwatch.StepRecord]:
    watch.flush()
    return watch.history(STEPS)
