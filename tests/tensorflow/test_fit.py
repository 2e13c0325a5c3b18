"""`model.fit` with a watch on it, against Keras' own clipping where that is right."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import gradwatch
from tests.tensorflow.conftest import (
    STEPS,
    compiled,
    difference,
    examples,
    fit,
    network,
    state,
    weights,
)


def clipping(**rule: object) -> dict:
    return {"version": 1, "clip": [{"eps": 0, **rule}]}


GLOBAL = clipping(limit=1.0)
HOW = {
    "graph": {},
    "eagerly": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several steps in one call": {"steps_per_execution": 4},
}
KERAS = {
    "global_clipnorm": (1.0, GLOBAL),
    "clipnorm": (0.4, clipping(limit=0.4, per="tensor")),
    "clipvalue": (0.1, clipping(limit=0.1, per="element")),
}


def adam(**arguments: object) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(1e-2, **arguments)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_weights_are_those_of_keras_own_clipping(how, attach):
    theirs = compiled(lambda: adam(global_clipnorm=1.0), **how)
    ours = compiled(adam, **how)
    watch = attach(ours, policy=GLOBAL)
    fit(theirs)
    fit(ours)
    watch.flush()
    assert difference(weights(ours), weights(theirs)) <= 1e-7
    records = watch.history(100)
    assert [record.step for record in records] == list(range(STEPS))
    assert all(record.clipped for record in records)
    assert all(record.total_norm_clipped == pytest.approx(1.0, rel=1e-6) for record in records)


@pytest.mark.parametrize("argument", KERAS)
def test_each_of_keras_arguments_is_a_rule(argument, attach):
    value, policy = KERAS[argument]
    theirs = compiled(lambda: adam(**{argument: value}))
    ours = compiled(adam)
    watch = attach(ours, policy=policy)
    fit(theirs)
    fit(ours)
    watch.flush()
    assert difference(weights(ours), weights(theirs)) <= 1e-7
    assert any(record.clipped for record in watch.history(100))


@pytest.mark.parametrize("by_policy", [False, True], ids=["of the optimizer", "of the policy"])
def test_keras_accumulation_is_clipped_once_a_window_behind_the_mean(by_policy, attach):
    theirs = compiled(lambda: adam(global_clipnorm=1.0, gradient_accumulation_steps=3))
    ours = compiled(adam if by_policy else lambda: adam(gradient_accumulation_steps=3))
    accumulate = {"accumulate": {"steps": 3, "partial": "carry"}} if by_policy else {}
    watch = attach(ours, policy={**GLOBAL, **accumulate})
    fit(theirs)
    fit(ours)
    watch.flush()
    assert difference(weights(ours), weights(theirs)) <= 1e-7
    records = watch.history(100)
    assert len(records) == STEPS // 3
    assert {record.micro_batches for record in records} == {3}


def test_half_precision_is_measured_unscaled_and_its_overflows_are_seen(attach, half_precision):
    theirs = compiled(lambda: adam(global_clipnorm=1.0))
    ours = compiled(adam)
    watch = attach(ours, policy=GLOBAL)
    fit(theirs)
    fit(ours)
    watch.flush()
    assert difference(weights(ours), weights(theirs)) <= 1e-7
    assert difference(state(ours.optimizer), state(theirs.optimizer)) <= 1e-7
    records = watch.history(100)
    assert len(records) == STEPS
    dropped = [record for record in records if record.skipped]
    assert {record.skipped for record in dropped} == {"overflow"}
    assert int(ours.optimizer.iterations.numpy()) == STEPS - len(dropped)
    assert records[0].loss_scale == 2.0**15
    assert all(record.total_norm < 100 for record in records if not record.skipped)


def test_without_a_policy_training_is_the_same_to_the_bit(attach):
    plain, watched = compiled(adam), compiled(adam)
    watch = attach(watched)
    fit(plain)
    fit(watched)
    watch.flush()
    assert difference(weights(watched), weights(plain)) == 0
    assert watch.latest.total_norm > 0
    assert not watch.latest.clipped


def test_norms_are_those_of_the_gradient_of_a_tape(attach):
    model = compiled(lambda: keras.optimizers.SGD(0.0))
    watch = attach(model)
    fit(model)
    watch.flush()
    x, y = examples()
    for record in watch.history(3):
        batch = slice(record.step * 8, record.step * 8 + 8)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[batch]) - y[batch]) ** 2)
        grads = tape.gradient(loss, model.trainable_variables)
        norms = [np.linalg.norm(np.array(grad, dtype=np.float64)) for grad in grads]
        np.testing.assert_allclose(record.tensor_norms_P, norms, rtol=1e-5)
        assert record.scalars["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert record.learning_rate == 0.0
    assert watch.latest.layers == ("dense", "dense_1") or len(watch.latest.layers) == 2


def test_attached_behind_a_first_fit_it_sees_the_second(attach):
    model = compiled(adam)
    fit(model)
    watch = attach(model, policy=GLOBAL)
    fit(model)
    watch.flush()
    assert watch.latest.step == STEPS - 1
    watch.close()
    fit(model)
    assert watch.latest.step == STEPS - 1


def test_a_train_step_of_ones_own_is_watched(attach):
    class Halved(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True)) / 2
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"loss": loss}

    keras.utils.set_random_seed(0)
    model = Halved([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(adam(), "mse")
    watch = attach(model, policy=GLOBAL)
    fit(model)
    watch.flush()
    assert watch.latest.step == STEPS - 1
    assert watch.latest.clipped


def test_train_on_batch_is_a_step(attach):
    model = compiled(adam)
    watch = attach(model, policy=GLOBAL)
    x, y = examples()
    for _ in range(3):
        model.train_on_batch(x[:8], y[:8])
    watch.flush()
    assert watch.latest.step == 2


def test_two_watches_on_one_optimizer_are_refused(attach):
    model = compiled(adam)
    attach(model)
    with pytest.raises(Exception, match="watched already"):
        attach(model)


LOAD = """
import sys
import keras
import numpy as np
model = keras.saving.load_model(sys.argv[1])
assert type(model.optimizer) is keras.optimizers.Adam
assert "gradwatch" not in sys.modules
state = [variable.numpy() for variable in model.optimizer.variables]
np.savez(sys.argv[2], *state)
"""


def test_a_model_that_was_saved_loads_without_gradwatch_with_its_optimizer(attach, tmp_path):
    model = compiled(adam)
    attach(model, policy=GLOBAL)
    fit(model)
    model.save(tmp_path / "model.keras")
    subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model.keras"), str(tmp_path / "state.npz")],
        check=True,
    )
    with np.load(tmp_path / "state.npz") as loaded:
        assert difference(list(loaded.values()), state(model.optimizer)) == 0


def test_a_model_with_a_watch_is_cloned_and_checkpointed_like_any_other(attach, tmp_path):
    model = compiled(adam)
    attach(model, policy=GLOBAL)
    fit(model)
    checkpoint = tf.train.Checkpoint(model=model)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    names = [name for name, _ in tf.train.list_variables(path)]
    assert not any("gradwatch" in name or "ring" in name for name in names)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert difference(weights(twin), weights(model)) == 0


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(attach):
    policy = clipping(limit={"z": 2, "warmup": 4, "until": 1.0}, per="layer")
    whole = compiled(adam)
    watch = attach(whole, policy=policy)
    fit(whole, epochs=2)
    watch.flush()
    once = [record.limits for record in watch.history(STEPS)]
    watch.close()

    parted = compiled(adam)
    first = attach(parted, policy=policy)
    fit(parted)
    saved = first.state_dict()
    first.close()
    second = attach(parted, policy=policy)
    second.load_state_dict(saved)
    fit(parted)
    second.flush()
    assert difference(weights(parted), weights(whole)) == 0
    assert [record.limits for record in second.history(STEPS)] == once
    assert second.latest.step == 2 * STEPS - 1


def test_layers_are_named_by_their_paths(attach):
    model = network(words=20)
    model.compile("sgd", "mse")
    watch = attach(model)
    names = [parameter.name for parameter in watch.info.layout.parameters]
    assert names[0].endswith("embedding.embeddings") or names[0].startswith("embedding")
    assert {parameter.module for parameter in watch.info.layout.parameters} == {
        "Embedding", "Dense",
    }  # fmt: skip
    assert not any("sequential" in name for name in names)


def test_samples_tell_of_updates(attach, tmp_path):
    model = compiled(lambda: keras.optimizers.SGD(1e-2))
    watch = attach(model, policy={"version": 1, "detect": {"every": 5}},
                   recording=tmp_path)  # fmt: skip
    before = weights(model)
    x, y = examples()
    model.train_on_batch(x[:8], y[:8])
    moved = [np.linalg.norm(a - b) for a, b in zip(weights(model), before, strict=True)]
    for _ in range(6):
        model.train_on_batch(x[:8], y[:8])
    watch.flush()
    watch.close()
    with gradwatch.open_recording(watch.recording) as recording:
        with_samples = {record.step: record.samples for record in recording if record.samples}
    assert set(with_samples) == {0, 5}
    np.testing.assert_allclose(with_samples[0]["update_norm"], moved, rtol=1e-4)
    norms = [np.linalg.norm(weight) for weight in before]
    np.testing.assert_allclose(with_samples[0]["weight_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(with_samples[0]["zero_share"], 0.0)
