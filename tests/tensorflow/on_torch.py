"""A process with Keras on torch, for `test_callback.py`: asserts, and ends with 0."""

from __future__ import annotations

import contextlib

import keras
import numpy as np

from gradwatch.errors import GradwatchError, TwoClippersError
from gradwatch.keras import GradWatch

POLICY = {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]}
draw = np.random.default_rng(0)
x = draw.standard_normal((192, 8)).astype(np.float32)
y = 3 * x.sum(1, keepdims=True)


def train(policy=None, x=x, **clip):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(1e-2, **clip), "mse")
    watching = GradWatch(policy, port=None, recording=None) if policy else None
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[watching] * bool(policy))
    weights = [variable.value.detach().numpy() for variable in model.trainable_variables]
    return weights, model, watching and watching.watch


def difference(a, b):
    return max(np.abs(p - q).max() for p, q in zip(a, b, strict=True))


def refused(error, **arguments):
    with contextlib.suppress(error):
        train(**arguments)
        return False
    return True


expected, _, _ = train(global_clipnorm=1.0)
found, model, watch = train(POLICY)
assert difference(found, expected) <= 1e-7
assert watch.latest.step == 23
assert [layer.partition("_")[0] for layer in watch.latest.layers] == ["dense", "dense"]
assert watch.info.framework.startswith("torch")
assert "apply" not in model.optimizer.__dict__

poisoned = x.copy()
poisoned[40] = np.nan
found, model, watch = train(POLICY, poisoned)
assert all(np.isfinite(weight).all() for weight in found)
assert int(model.optimizer.iterations.value) == 23
assert [record.skipped for record in watch.history(24)].count("nonfinite") == 1

assert refused(TwoClippersError, policy=POLICY, clipnorm=1.0)
assert refused(GradwatchError, policy=POLICY, gradient_accumulation_steps=2)
assert refused(GradwatchError, policy={"version": 1, "clip": [{"per": "unit", "limit": 1.0}]})
assert refused(GradwatchError, policy={"version": 1, "accumulate": {"steps": 2}})

keras.mixed_precision.set_dtype_policy("mixed_float16")
expected, _, _ = train(global_clipnorm=1.0)
found, _, _ = train(POLICY)
assert difference(found, expected) <= 1e-6
