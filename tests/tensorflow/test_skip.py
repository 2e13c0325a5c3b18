"""A step that is skipped leaves weights and the state of the optimizer as they are, to the bit."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradwatch.errors import TrainingStopped
from tests.tensorflow.conftest import compiled, difference, examples, state, weights

SKIP = {"version": 1, "clip": [{"limit": 1.0}]}
HOW = {"graph": {}, "eagerly": {"run_eagerly": True}, "xla": {"jit_compile": True}}


def adamw() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(1e-2, weight_decay=0.1, use_ema=True, ema_momentum=0.9)


def poisoned() -> np.ndarray:
    x, _ = examples()
    x[3, 0] = math.nan
    return x


def batch(model: keras.Model, x: np.ndarray) -> None:
    model.train_on_batch(x[:8], examples()[1][:8])


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_step_with_nan_is_a_step_that_was_not_taken(how, attach):
    model = compiled(adamw, **how)
    watch = attach(model, policy=SKIP)
    batch(model, examples()[0])
    before = weights(model), state(model.optimizer)
    batch(model, poisoned())
    assert difference(weights(model), before[0]) == 0
    assert difference(state(model.optimizer), before[1]) == 0
    batch(model, examples()[0])
    assert difference(weights(model), before[0]) > 0
    watch.flush()
    assert [record.skipped for record in watch.history(3)] == [None, "nonfinite", None]
    assert watch.skipped is None


def test_under_a_strategy_too(attach, mirrored):
    model = compiled(adamw, mirrored)
    watch = attach(model, policy=SKIP)
    batch(model, examples()[0])
    before = weights(model), state(model.optimizer)
    batch(model, poisoned())  # one of the two replicas sees the NaN
    assert difference(weights(model), before[0]) == 0
    assert difference(state(model.optimizer), before[1]) == 0
    for variable in model.optimizer.variables:
        replicas = mirrored.experimental_local_results(variable.value)
        assert len({replica.numpy().tobytes() for replica in replicas}) == 1
    batch(model, examples()[0])
    assert difference(weights(model), before[0]) > 0
    watch.flush()
    assert [record.skipped for record in watch.history(3)] == [None, "nonfinite", None]


def test_a_rule_that_skips_does_so_above_its_limit(attach):
    model = compiled(adamw)
    model.optimizer.build(model.trainable_variables)
    watch = attach(model, policy={"version": 1, "clip": [{"limit": 1e-6, "then": "skip"}]})
    before = weights(model), state(model.optimizer)
    batch(model, examples()[0])
    assert difference(weights(model), before[0]) == 0
    assert difference(state(model.optimizer), before[1]) == 0
    watch.flush()
    assert watch.latest.skipped == "global"


def test_keras_accumulation_recovers_from_an_infinite_micro_batch(attach):
    model = compiled(lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2))
    watch = attach(model, policy=SKIP)
    for x in (examples()[0], poisoned()):
        batch(model, x)
    before = weights(model)
    assert all(np.isfinite(weight).all() for weight in before)
    for _ in range(2):
        batch(model, examples()[0])
    assert difference(weights(model), before) > 0
    watch.flush()
    assert [record.skipped for record in watch.history(3)] == ["nonfinite", None]


def test_zero_takes_the_bad_tensor_and_steps_with_the_others(attach):
    model = compiled(lambda: keras.optimizers.SGD(0.1))
    watch = attach(model, policy={"version": 1, "guard": {"nonfinite": "zero"}})
    before = weights(model)
    x, y = examples()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x[:8]) - y[:8]) ** 2)
    grads = tape.gradient(loss, model.trainable_variables)
    grads[0] = grads[0] * math.nan
    model.optimizer.apply(grads, model.trainable_variables)
    after = weights(model)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_allclose(after[3], before[3] - 0.1 * grads[3].numpy(), rtol=1e-6)
    watch.flush()
    assert watch.latest.skipped is None


def fit_long(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


@pytest.mark.parametrize("guard", [{"nonfinite": "stop"}, {"nonfinite": "skip", "patience": 1}])
def test_a_run_that_is_stopped_raises_and_makes_no_update_after(guard, attach):
    model = compiled(adamw)
    watch = attach(model, policy={"version": 1, "guard": guard})
    batch(model, examples()[0])
    before = weights(model), state(model.optimizer)
    x, y = poisoned(), examples()[1]
    with pytest.raises(TrainingStopped):
        fit_long(model, np.tile(x[:8], (400, 1)), np.tile(y[:8], (400, 1)))
    assert difference(weights(model), before[0]) == 0
    with pytest.raises(TrainingStopped):
        batch(model, examples()[0])
    assert difference(weights(model), before[0]) == 0
    assert difference(state(model.optimizer), before[1]) == 0
    assert watch.latest.skipped == "nonfinite"


def test_shadow_says_what_it_would_have_done_and_touches_nothing(attach):
    plain, shadowed = compiled(adamw), compiled(adamw)
    watch = attach(shadowed, policy={**SKIP, "mode": "shadow"})
    for model in (plain, shadowed):
        batch(model, examples()[0])
    assert difference(weights(shadowed), weights(plain)) == 0
    watch.flush()
    assert watch.latest.clipped
    assert watch.latest.fired == ("global",)
