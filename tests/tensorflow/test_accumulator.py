"""The gradient of several micro-batches is the gradient of all of their samples."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradwatch.errors import PolicyError
from tests.tensorflow.conftest import difference, examples, network, weights

WORDS, SAMPLES, MICRO, EVERY = 30, 104, 16, 4
POLICY = {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]}


def losses(model, x, y):
    return tf.reduce_mean((model(x, training=True) - y) ** 2)


def gradients(model, x, y, part=1.0):
    with tf.GradientTape() as tape:
        loss = part * losses(model, x, y)
    return tape.gradient(loss, model.trainable_variables)


def micro_batches():
    """Of 16 samples, the last of a window and of the data of fewer."""
    x, y = examples(WORDS, SAMPLES)
    ends = [16, 32, 48, 58, 74, 90, 96, 104]
    return [(x[a:b], y[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def by_big_batches(windows):
    """The reference: one batch a step, Keras' Adam, TensorFlow's norm of dense gradients."""
    model, optimizer = network(WORDS), keras.optimizers.Adam(1e-2)
    for window in windows:
        x, y = (np.concatenate(column) for column in zip(*window, strict=True))
        grads = [tf.convert_to_tensor(grad) for grad in gradients(model, x, y)]
        grads, _ = tf.clip_by_global_norm(grads, 1.0)
        optimizer.apply(grads, model.trainable_variables)
    return weights(model)


@pytest.mark.parametrize("how", ["graph", "xla", "two replicas"])
def test_uneven_micro_batches_are_one_big_batch(how, attach, mirrored):
    batches = micro_batches()
    expected = by_big_batches([batches[:4], batches[4:8]] * 3)
    strategy = mirrored if how == "two replicas" else None
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, optimizer = network(WORDS), keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)
    watch = attach(model, optimizer, policy=POLICY)
    acc = watch.accumulator(every=EVERY)

    def one(x, y, boundary):
        acc.add(gradients(model, x, y), weight=tf.shape(x)[0])
        if boundary:
            optimizer.apply(acc.take(), model.trainable_variables)

    @tf.function(jit_compile=how == "xla")
    def micro(x, y, boundary: bool):
        if strategy is None:
            one(x, y, boundary)
        else:
            strategy.run(one, args=(x, y, boundary))

    def parted(values):
        if strategy is None:
            return tf.constant(values)
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(np.array_split(values, 2)[context.replica_id_in_sync_group])
        )

    for _ in range(3):
        for x, y in batches:
            micro(parted(x), parted(y), acc.boundary())
    assert difference(weights(model), expected) <= 1e-6
    watch.flush()
    records = watch.history(10)
    assert [record.micro_batches for record in records] == [4] * 6
    assert [record.weight for record in records] == [58, 46] * 3


def test_a_short_last_window_is_flushed_as_what_arrived(attach):
    batches = micro_batches()[:6]
    expected = by_big_batches([batches[:4], batches[4:]])
    model, optimizer = network(WORDS), keras.optimizers.Adam(1e-2)
    watch = attach(model, optimizer, policy=POLICY)
    acc = watch.accumulator(every=EVERY)

    @tf.function
    def update():
        optimizer.apply(acc.take(), model.trainable_variables)

    for x, y in batches:
        boundary = acc.boundary()
        acc.add(gradients(model, x, y), weight=len(x))
        if boundary:
            update()
    assert acc.flush(update)
    assert difference(weights(model), expected) <= 1e-6
    assert not acc.flush(update)


def test_the_last_loss_of_one_tape_is_not_the_gradient_of_all(attach):
    """The form that is shown in many places: its gradient is that of the last micro-batch."""
    batches = micro_batches()[:4]
    model = network(WORDS)
    true = gradients(model, *(np.concatenate(column) for column in zip(*batches, strict=True)))
    with tf.GradientTape() as tape:
        for x, y in batches:
            loss = losses(model, x, y)
    shown = tape.gradient(loss, model.trainable_variables)
    last = gradients(model, *batches[-1])
    acc = attach(model, policy=POLICY).accumulator(every=4)
    for x, y in batches:
        acc.add(gradients(model, x, y), weight=len(x))
    ours = acc.take()
    found = (true, shown, last, ours)
    dense = [[tf.convert_to_tensor(grad).numpy() for grad in grads] for grads in found]
    assert difference(dense[1], dense[2]) == 0
    assert difference(dense[1], dense[0]) > 0.1
    assert difference(dense[3], dense[0]) <= 1e-5 * max(np.abs(g).max() for g in dense[0])


def test_an_infinite_micro_batch_does_not_poison_the_next_window(attach):
    model, optimizer = network(WORDS), keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    watch = attach(model, optimizer, policy=POLICY)
    acc = watch.accumulator(every=2)
    x, y = micro_batches()[0]
    before = weights(model)
    for part in (np.inf, 1.0):
        acc.add(gradients(model, x, y, part), weight=len(x))
    optimizer.apply(acc.take(), model.trainable_variables)
    assert difference(weights(model), before) == 0
    for _ in range(2):
        acc.add(gradients(model, x, y), weight=len(x))
    optimizer.apply(acc.take(), model.trainable_variables)
    assert all(np.isfinite(weight).all() for weight in weights(model))
    watch.flush()
    assert [record.skipped for record in watch.history(2)] == ["nonfinite", None]
    assert watch.latest.total_norm < np.inf


@pytest.mark.parametrize("weigh", ["mean", "sum", "weight"])
def test_the_policy_says_how_micro_batches_weigh(weigh, attach):
    policy = {"version": 1, "accumulate": {"steps": 2, "weigh": weigh}}
    module = tf.Module()
    module.w = tf.Variable(0.0)
    acc = attach(module, policy=policy).accumulator()
    acc.add([tf.constant(1.0)], weight=3)
    acc.add([tf.constant(5.0)], weight=1)
    (found,) = acc.take()
    assert float(found) == {"mean": 3.0, "sum": 6.0, "weight": 2.0}[weigh]


@pytest.mark.parametrize(("partial", "left"), [("drop", 0.0), ("carry", 1.0)])
def test_a_window_that_is_not_full_is_dropped_or_carried(partial, left, attach):
    policy = {"version": 1, "accumulate": {"steps": 2, "partial": partial, "weigh": "sum"}}
    module = tf.Module()
    module.w = tf.Variable(0.0)
    acc = attach(module, policy=policy).accumulator()
    assert not acc.boundary()
    acc.add([tf.constant(1.0)])
    assert not acc.flush(lambda: pytest.fail("there is no update"))
    assert float(acc.take()[0]) == left
    assert acc.boundary() == (partial == "carry")


def test_it_has_to_be_said_how_many_once(attach):
    model = network()
    with pytest.raises(PolicyError, match="every"):
        attach(model).accumulator()
    policy = {"version": 1, "accumulate": {"steps": 2}}
    with pytest.raises(PolicyError, match="Leave one of them out"):
        attach(model, policy=policy).accumulator(every=3)
