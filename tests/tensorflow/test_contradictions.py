"""What contradicts the policy, or cannot be had in a graph, is refused with its mend."""

from __future__ import annotations

import subprocess
import sys

import keras
import pytest

from gradwatch.errors import AttachError, PolicyError, TwoClippersError
from tests.tensorflow.conftest import compiled, fit, network

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


@pytest.mark.parametrize(
    ("argument", "mend"),
    [
        ("clipnorm", "{per: tensor, limit: 0.5}"),
        ("global_clipnorm", "{limit: 0.5}"),
        ("clipvalue", "{per: element, limit: 0.5}"),
    ],
)
def test_two_clippers_are_refused(argument, mend, attach):
    model = compiled(lambda: keras.optimizers.Adam(**{argument: 0.5}))
    with pytest.raises(TwoClippersError) as refused:
        attach(model, policy=CLIP)
    assert f"Adam({argument}=0.5)" in str(refused.value)
    assert f"{argument}=None" in str(refused.value)
    assert mend in str(refused.value)


def test_a_loss_scaler_around_a_clipper_too(attach, half_precision):
    model = compiled(lambda: keras.optimizers.Adam(clipnorm=0.5))
    with pytest.raises(TwoClippersError, match="clipnorm"):
        attach(model, policy=CLIP)


@pytest.mark.parametrize("policy", [None, {**CLIP, "mode": "shadow"}])
def test_who_only_observes_sees_the_norm_before_keras_clips(policy, attach):
    model = compiled(lambda: keras.optimizers.Adam(global_clipnorm=0.5))
    watch = attach(model, policy=policy)
    fit(model)
    watch.flush()
    assert watch.latest.total_norm > 5


@pytest.mark.parametrize(
    ("accumulate", "said"),
    [
        ({"steps": 3, "partial": "carry"}, "gradient_accumulation_steps=2"),
        ({"steps": 2}, "must be carry"),
        ({"steps": 2, "partial": "carry", "weigh": "weight"}, "must be mean"),
        ({"steps": {0: 1, 10: 2}, "partial": "carry"}, "must be one number"),
    ],
)
def test_windows_that_are_not_those_of_keras_are_refused(accumulate, said, attach):
    model = compiled(lambda: keras.optimizers.Adam(gradient_accumulation_steps=2))
    with pytest.raises(PolicyError, match=said):
        attach(model, policy={"version": 1, "accumulate": accumulate})


def test_accumulation_that_comes_too_late_is_refused(attach):
    model = compiled(keras.optimizers.Adam)
    fit(model)
    with pytest.raises(AttachError, match="built already"):
        attach(model, policy={"version": 1, "accumulate": {"steps": 2, "partial": "carry"}})


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"measure": "update", "limit": 1.0, "then": "skip"}, "measure: update is not supported"),
        ({"measure": "loss", "limit": 1.0, "then": "skip"}, "measure: loss is not supported"),
        ({"groups": [0], "limit": 1.0}, "no parameter groups"),
        ({"limit": {"quantile": 0.9, "window": "all"}}, "grows without end"),
    ],
)
def test_rules_that_a_graph_cannot_run_are_refused(rule, said, attach, tmp_path):
    with pytest.raises(PolicyError, match=said):
        attach(network(), policy={"version": 1, "clip": [rule]})


def test_the_refusal_names_file_and_line(attach, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nclip:\n  - limit: 1.0\n    measure: update\n    then: skip\n")
    with pytest.raises(PolicyError, match=r":4:5: clip\[0\]\.measure: update"):
        attach(network(), policy=file)


def test_a_model_without_variables_is_refused(attach):
    class Late(keras.Model):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(2, 2))

        def call(self, x):
            return x @ self.kernel

    with pytest.raises(AttachError, match="run one batch through it"):
        attach(Late())
    with pytest.raises(AttachError, match=r"optimizer\.build"):
        attach(keras.optimizers.Adam())


def test_what_is_no_model_is_refused(attach):
    with pytest.raises(AttachError, match="a model of Keras"):
        attach(object())
    with pytest.raises(AttachError, match="expected an optimizer of Keras"):
        attach(network(), object())


@pytest.mark.parametrize("argument", ["scaler", "distributed", "shard_keys"])
def test_arguments_for_torch_are_refused(argument, attach):
    with pytest.raises(AttachError, match=f"attach\\({argument}"):
        attach(network(), **{argument: {}})


def test_gradwatch_does_not_import_tensorflow():
    code = "import sys, gradwatch; assert not {'tensorflow', 'keras', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
