"""`gradwatch.clip_grads_`: a policy as one call."""

from __future__ import annotations

import math

import pytest
import torch

import gradwatch

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


def grads(task) -> list[torch.Tensor]:
    return [parameter.grad for parameter in task.model.parameters()]


@pytest.mark.parametrize("form", ["module", "named", "tensors"])
def test_it_is_clip_grad_norm_to_the_bit(task, form):
    other = task.copy()
    for one in (task, other):
        one.gradient(0, 100.0)
    model = task.model
    given = {"module": model, "named": model.named_parameters(), "tensors": model.parameters()}
    total = gradwatch.clip_grads_(given[form], CLIP)
    expected = torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
    assert torch.equal(total, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads(task), grads(other), strict=True))


def test_rules_may_name_parameters(task):
    task.gradient(0, 100.0)
    rule = {"params": "head.*", "limit": 0.5}
    gradwatch.clip_grads_(task.model, {"version": 1, "clip": [rule]})
    assert math.hypot(*(float(p.grad.norm()) for p in task.model.head.parameters())) < 0.5000005


def test_a_step_to_be_skipped_has_no_gradients(task):
    task.gradient(0)
    task.model.head.bias.grad[0] = math.nan
    assert math.isnan(gradwatch.clip_grads_(task.model, CLIP))
    assert grads(task) == [None] * 7


def test_stop_raises_and_a_wrong_policy_too(task):
    task.gradient(0, 100.0)
    with pytest.raises(gradwatch.TrainingStopped, match="rule global is over its limit"):
        gradwatch.clip_grads_(task.model, {"version": 1, "clip": [{"limit": 1, "then": "stop"}]})
    with pytest.raises(gradwatch.PolicyError, match="sees no micro-batches"):
        gradwatch.clip_grads_(task.model, {"version": 1, "accumulate": {"steps": 2}})
    with pytest.raises(gradwatch.PolicyError, match="no parameter matches"):
        gradwatch.clip_grads_(task.model, {"version": 1, "clip": [{"limit": 1, "params": "x"}]})


def test_in_shadow_it_only_measures(task):
    task.gradient(0, 100.0)
    before = [grad.clone() for grad in grads(task)]
    gradwatch.clip_grads_(task.model, {**CLIP, "mode": "shadow"})
    assert all(torch.equal(a, b) for a, b in zip(grads(task), before, strict=True))


def test_one_tensor_is_a_list_of_one_and_none_is_nothing(task):
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.full((4, 3), 10.0)
    assert float(gradwatch.clip_grads_(parameter, CLIP)) == pytest.approx(120**0.5 * 10**0.5)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-6)
    assert gradwatch.clip_grads_([], CLIP) == 0
    with pytest.raises(TypeError, match="Received: dict"):
        gradwatch.clip_grads_([{"params": [parameter]}], CLIP)
