"""Loops with a GradientTape: `process`, `apply_gradients`, and optimizers that are attached."""

from __future__ import annotations

import logging
import logging.handlers

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradwatch.errors import AttachError, PolicyError
from tests.tensorflow.conftest import difference, examples, network, state, weights

ZERO = {"version": 1, "guard": {"nonfinite": "zero"}, "clip": [{"limit": 1.0, "eps": 0}]}
SKIP = {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]}
STEPS = 12


def train(model, step, count=STEPS):
    x, y = examples()
    for i in range(count):
        step(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])


def gradients(model, x, y, scale=1.0):
    with tf.GradientTape() as tape:
        loss = scale * tf.reduce_mean((model(x, training=True) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables)


def by_tensorflow(optimizer):
    model = network()

    @tf.function
    def step(x, y):
        grads, _ = tf.clip_by_global_norm(gradients(model, x, y), 1.0)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    train(model, step)
    return weights(model)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_processed_gradients_are_clipped_as_by_tensorflow(jit, attach):
    expected = by_tensorflow(keras.optimizers.Adam(1e-2))
    model, optimizer = network(), keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    watch = attach(model, policy=ZERO)

    @tf.function(jit_compile=jit)
    def step(x, y):
        grads = watch.process(gradients(model, x, y), model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    train(model, step)
    watch.flush()
    assert difference(weights(model), expected) <= 1e-7
    assert watch.latest.step == STEPS - 1


def test_a_loss_scale_is_taken_out_of_what_is_measured_and_left_in_the_gradient(attach):
    model = network()
    watch = attach(model, policy=ZERO)
    x, y = examples()
    plain = watch.process(gradients(model, x[:8], y[:8]))
    scaled = watch.process(gradients(model, x[:8], y[:8], 1024.0), loss_scale=1024.0)
    watch.flush()
    first, second = watch.history(2)
    assert second.total_norm == pytest.approx(first.total_norm, rel=1e-6)
    assert second.loss_scale == 1024.0
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other, 1024.0 * one, rtol=1e-5)


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "given"])
def test_an_optimizer_is_attached_or_given_with_the_gradients(attached, attach):
    expected = by_tensorflow(keras.optimizers.Adam(1e-2))
    model, optimizer = network(), keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    watch = attach(model, *([optimizer] if attached else []), policy=SKIP)

    @tf.function
    def step(x, y):
        pairs = zip(gradients(model, x, y), model.trainable_variables, strict=True)
        if attached:
            optimizer.apply_gradients(pairs)
        else:
            watch.apply_gradients(optimizer, pairs)

    train(model, step)
    assert difference(weights(model), expected) <= 1e-7
    before = weights(model), state(optimizer)
    step(np.full((8, 8), np.nan, np.float32), np.zeros((8, 1), np.float32))
    assert difference(weights(model), before[0]) == 0
    assert difference(state(optimizer), before[1]) == 0
    watch.flush()
    assert watch.latest.skipped == "nonfinite"


def test_a_skip_is_refused_where_gradients_are_only_handed_back(attach):
    model = network()
    watch = attach(model, policy=SKIP)
    with pytest.raises(PolicyError, match=r"watch\.apply_gradients"):
        watch.process([tf.zeros(v.shape) for v in model.trainable_variables])


def test_gradients_are_not_clipped_twice(attach):
    model, optimizer = network(), keras.optimizers.SGD(0.1)
    watch = attach(model, optimizer, policy=ZERO)
    with pytest.raises(AttachError, match="twice"):
        watch.process([tf.zeros(v.shape) for v in model.trainable_variables])


def test_a_plain_module_is_named_by_its_attributes(attach):
    module = tf.Module()
    module.encoder = tf.Module()
    module.encoder.w = tf.Variable(np.ones((2, 2), np.float32))
    module.b = tf.Variable(np.ones(2, np.float32))
    watch = attach(module, policy={**ZERO, "clip": [{"params": "encoder.*", "limit": 1.0}]})
    by_name = {"encoder.w": 0, "b": 1}
    variables = [module.encoder.w, module.b]
    found = watch.process([tf.fill((2, 2), 2.0), tf.fill((2,), 2.0)], variables)
    np.testing.assert_allclose(found[by_name["encoder.w"]], np.full((2, 2), 0.5), rtol=1e-5)
    np.testing.assert_allclose(found[by_name["b"]], np.full(2, 2.0))
    watch.flush()
    assert set(watch.info.layout.layers) == {"encoder", "(root)"}


def test_a_variable_without_a_gradient_stays_without(attach):
    model = network()
    watch = attach(model, policy=ZERO)
    grads = [tf.ones(v.shape) for v in model.trainable_variables]
    grads[1] = None
    found = watch.process(grads)
    assert found[1] is None
    watch.flush()
    assert watch.latest.present_P.tolist() == [True, False, True, True]
    assert watch.latest.tensor_coefs_P[1] == 1.0


def test_a_variable_that_is_not_watched_is_not_passed_over(attach):
    model = network()
    watch = attach(model, policy=ZERO)
    other = keras.Variable(np.zeros(2, np.float32), name="other")
    with pytest.raises(AttachError, match="other was not trainable or not there"):
        watch.process([tf.ones(2)], [other])


def test_repeated_ids_of_an_embedding_are_clipped_to_the_limit(attach):
    table = keras.Variable(np.zeros((6, 2), np.float32), name="embeddings")
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([table])
    attach(optimizer, policy={"version": 1, "clip": [{"limit": 1.0, "eps": 0}]})

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            looked_up = tf.gather(table.value, [4, 1, 4])
            loss = tf.reduce_sum(looked_up * [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
        optimizer.apply(tape.gradient(loss, [table.value]), [table])

    step()
    assert np.linalg.norm(table.numpy()) == pytest.approx(1.0, rel=1e-6)


def test_what_is_logged_behind_a_step_is_of_that_step(attach):
    model, optimizer = network(), keras.optimizers.SGD(0.1)
    watch = attach(model, optimizer)

    @tf.function
    def step(x, y):
        optimizer.apply(gradients(model, x, y), model.trainable_variables)

    x, y = examples()
    for i in range(5):
        step(x[:8], y[:8])
        watch.log(number=tf.constant(float(i)))
    watch.flush()
    assert [record.scalars["number"] for record in watch.history(5)] == [0, 1, 2, 3, 4]


LEGACY = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@LEGACY
@pytest.mark.parametrize("loop", ["fit", "tape"])
def test_tf_keras_is_watched_like_keras(loop, attach):
    tf_keras = pytest.importorskip("tf_keras")
    found = []
    for ours in (False, True):
        tf_keras.utils.set_random_seed(0)
        layers = tf_keras.layers
        model = tf_keras.Sequential(
            [layers.Input((8,)), layers.Dense(16, activation="tanh"), layers.Dense(1)]
        )
        clip = {} if ours else {"global_clipnorm": 1.0}
        optimizer = tf_keras.optimizers.Adam(1e-2, **clip)
        model.compile(optimizer, "mse")
        watch = attach(model, policy=SKIP) if ours else None
        x, y = examples()
        if loop == "fit":
            model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        else:
            for i in range(24):
                grads = gradients(model, x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
                optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        found.append([variable.numpy() for variable in model.trainable_variables])
    watch.flush()
    assert difference(*found) <= 1e-7
    assert watch.latest.step == 23
    assert watch.latest.learning_rate == pytest.approx(1e-2)
    assert watch.info.layout.layers[0].startswith("dense")


def test_a_gradient_that_the_loop_clips_itself_is_noticed(attach):
    model, optimizer = network(), keras.optimizers.SGD(1e-3)
    watch = attach(model, optimizer)

    @tf.function
    def step(x, y):
        grads, _ = tf.clip_by_global_norm(gradients(model, x, y, 100.0), 1.0)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    train(model, step)
    watch.flush()
    assert [a.kind for one in watch.history(STEPS) for a in one.anomalies] == ["clipped_elsewhere"]


@pytest.mark.parametrize("way", ["process", "apply", "apply_gradients", "accumulator"])
def test_a_loop_that_is_compiled_hears_nothing_of_autograph(way, attach):
    model, optimizer = network(), keras.optimizers.SGD(1e-2)
    optimizer.build(model.trainable_variables)
    watch = attach(model, *([optimizer] if way == "apply" else []), policy=ZERO)
    window = watch.accumulator(every=1)

    @tf.function(jit_compile=True)
    def step(x, y):
        grads = gradients(model, x, y)
        if way == "accumulator":
            window.add(grads)
            grads = window.take()
        if way == "process":
            grads = watch.process(grads, model.trainable_variables)
        if way in ("process", "apply"):
            optimizer.apply(grads, model.trainable_variables)
        else:
            watch.apply_gradients(optimizer, zip(grads, model.trainable_variables, strict=True))

    said = logging.handlers.BufferingHandler(100)
    tf.get_logger().addHandler(said)
    try:
        train(model, step, 1)
    finally:
        tf.get_logger().removeHandler(said)
    assert [record.getMessage() for record in said.buffer] == []
    watch.flush()
    assert watch.latest.step == 0
