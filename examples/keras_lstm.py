"""An LSTM that reads Python's argparse in a GradientTape loop: clipped by value and by norm, over
windows of four micro-batches.

python examples/keras_lstm.py [STEPS]
"""

import argparse
import inspect
import sys

import keras
import numpy as np
import tensorflow as tf

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
keras.utils.set_random_seed(0)
draw = np.random.default_rng(0)

text = inspect.getsource(argparse)
alphabet = sorted(set(text))
codes = np.array([alphabet.index(character) for character in text])

model = keras.Sequential(
    [
        keras.Input((64,), dtype="int32"),
        keras.layers.Embedding(len(alphabet), 32, name="embed"),
        keras.layers.LSTM(128, return_sequences=True, name="lstm"),
        keras.layers.Dense(len(alphabet), name="head"),
    ]
)
optimizer = keras.optimizers.AdamW(1e-2)
criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

policy = {
    "version": 1,
    "clip": [
        {"name": "value", "params": "embed.*", "per": "element", "limit": 0.01},
        {"name": "norm", "limit": 0.25},
    ],
}
watch = gradwatch.attach(model, optimizer, policy, run="keras-lstm")
window = watch.accumulator(every=4)


@tf.function
def micro(inputs, targets, boundary: bool):  # two traces, and no branch in either
    with tf.GradientTape() as tape:
        loss = criterion(targets, model(inputs, training=True))
    window.add(tape.gradient(loss, model.trainable_variables), weight=tf.shape(inputs)[0])
    if boundary:
        optimizer.apply(window.take(), model.trainable_variables)
    return loss


for _ in range(4 * steps):
    starts = draw.integers(0, len(codes) - 65, 4)
    read = np.stack([codes[start : start + 65] for start in starts])
    boundary = window.boundary()
    loss = micro(tf.constant(read[:, :-1], tf.int32), tf.constant(read[:, 1:], tf.int32), boundary)
    if boundary:
        watch.log(loss=loss)

print(watch)
watch.close()
