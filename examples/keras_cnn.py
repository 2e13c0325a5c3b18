"""A convolutional network on scikit-learn's digits with Keras' `fit`: clipped by value and by norm,
over windows of two micro-batches.

python examples/keras_cnn.py [STEPS]
"""

import sys

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from gradwatch.keras import GradWatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
keras.utils.set_random_seed(0)

digits = load_digits()
images = digits.images[..., None].astype("float32") / 16
batches = tf.data.Dataset.from_tensor_slices((images, digits.target)).shuffle(2000, seed=0)
batches = batches.repeat().batch(32)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
model.compile(
    keras.optimizers.SGD(0.1, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)

policy = {
    "version": 1,
    "accumulate": {"steps": 2, "partial": "carry"},  # Keras' own accumulation, set before it builds
    "clip": [
        {"name": "value", "per": "element", "limit": 0.05},
        {"name": "norm", "limit": 0.5},
    ],
}
watching = GradWatch(policy, run="keras-cnn")

history = model.fit(
    batches, steps_per_epoch=2 * steps, shuffle=False, callbacks=[watching], verbose=0
)
print(watching.watch)
print(f"loss {history.history['loss'][0]:.3f}")
