"""Two logical devices, so that two replicas can train, and small networks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import pytest
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

STEPS = 24
BATCH = 8


@pytest.fixture(scope="session")
def mirrored() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def half_precision() -> Iterator[None]:
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    yield
    keras.mixed_precision.set_dtype_policy("float32")


def network(words: int = 0) -> keras.Model:
    """A small one with the same weights each time; of words where there are any."""
    keras.utils.set_random_seed(0)
    if words:
        front = [keras.Input((6,), dtype="int32"), keras.layers.Embedding(words, 8),
                 keras.layers.GlobalAveragePooling1D()]  # fmt: skip
    else:
        front = [keras.Input((8,))]
    return keras.Sequential(
        [*front, keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    )


def examples(words: int = 0, count: int = STEPS * BATCH) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    if words:
        x = draw.integers(0, words, (count, 6)).astype(np.int32)
        return x, x.sum(1, keepdims=True).astype(np.float32)
    x = draw.standard_normal((count, 8)).astype(np.float32)
    return x, 3 * x.sum(1, keepdims=True)


def compiled(
    optimizer: Callable[[], Any], strategy: Any = None, *, words: int = 0, **how: Any
) -> keras.Model:
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model = network(words)
        model.compile(optimizer(), "mse", **how)
    return model


def fit(model: keras.Model, *, words: int = 0, epochs: int = 1, x: Any = None) -> None:
    inputs, targets = examples(words)
    inputs = inputs if x is None else x
    model.fit(inputs, targets, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)


def weights(model: Any) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.trainable_variables]


def state(optimizer: Any) -> list[np.ndarray]:
    return [variable.numpy() for variable in optimizer.variables]


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max(initial=0.0)) for x, y in zip(a, b, strict=True))
