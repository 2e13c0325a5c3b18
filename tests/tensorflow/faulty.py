"""The demo's task in Keras, once for each fault, served to a Prometheus: for `test_alerts.py`.

python faulty.py TARGETS FAULT...
"""

from __future__ import annotations

import sys
import time

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from gradwatch.keras import GradWatch

STEPS, FAULT_STEP, STEP_SECONDS = 260, 180, 0.03
POLICY = {
    "version": 1,
    "guard": {"nonfinite": "skip", "patience": 10},
    "clip": [{"name": "global", "limit": 1.0}],
}
pixels, labels = load_digits(return_X_y=True)
images = ((pixels - pixels.mean()) / pixels.std()).reshape(-1, 8, 8, 1).astype(np.float32)


class Scaled(keras.layers.Layer):
    """Times a number that may be changed while the model trains."""

    def __init__(self) -> None:
        super().__init__()
        self.by = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x):
        return x * self.by


class Fault(keras.callbacks.Callback):
    """As `gradwatch.demo.faults`: one thing is broken, for some steps."""

    def __init__(self, name: str, alive: Scaled, loudness: keras.Variable) -> None:
        super().__init__()
        self.name, self.alive, self.loudness = name, alive, loudness

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(STEP_SECONDS)
        since = batch - FAULT_STEP
        optimizer = self.model.optimizer
        if self.name == "lr" and since in (0, 4):
            optimizer.learning_rate.assign(
                optimizer.learning_rate * (100.0 if since == 0 else 0.01)
            )
        if self.name == "loss" and since in (0, 10):
            self.loudness.assign(1000.0 if since == 0 else 1.0)
        if self.name == "dead" and since == 0:
            self.alive.by.assign(0.0)


def batches(fault: str):
    draw = np.random.default_rng(0)
    for step in range(STEPS):
        chosen = draw.integers(0, len(images), 128)
        x = images[chosen] + 0.5 * draw.standard_normal((128, 8, 8, 1), dtype=np.float32)
        if fault == "nan" and step == FAULT_STEP:
            x[0, 0, 0, 0] = np.nan
        yield x, np.eye(10, dtype=np.float32)[labels[chosen]]


def train(fault: str, targets: str) -> None:
    keras.utils.set_random_seed(0)
    alive, loudness = Scaled(), keras.Variable(1.0, trainable=False)

    def active():
        return keras.layers.LeakyReLU(negative_slope=0.1)

    conv = keras.layers.Conv2D
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            conv(16, 3, padding="same"), active(),
            conv(32, 3, padding="same"), active(), keras.layers.MaxPooling2D(),
            conv(32, 3, padding="same"), alive, active(), keras.layers.MaxPooling2D(),
            keras.layers.Flatten(), keras.layers.Dense(64), active(), keras.layers.Dense(10),
        ]
    )  # fmt: skip
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        lambda y, logits: loudness * entropy(y, logits),
    )
    watching = GradWatch(
        POLICY, run=f"keras-{fault}", port=0, recording=None, discovery=targets, linger=3
    )
    shapes = (tf.TensorSpec((128, 8, 8, 1)), tf.TensorSpec((128, 10)))
    data = tf.data.Dataset.from_generator(lambda: batches(fault), output_signature=shapes)
    callbacks = [watching, Fault(fault, alive, loudness)]
    model.fit(data, shuffle=False, callbacks=callbacks, verbose=0)
    print(watching.watch, flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        train(name, sys.argv[1])
