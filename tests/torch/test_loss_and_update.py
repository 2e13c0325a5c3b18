"""Rules that compare the loss of the step, and the update that is about to be made."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.policy import load_policy

SKIP = {"measure": "loss", "limit": 5.0, "then": "skip", "name": "loss"}


def policy(*rules, **sections):
    return {"version": 1, **sections, "clip": list(rules)}


def steps(task, watch, optimizer, losses):
    """Whether each step was skipped."""
    seen = []
    for loss in losses:
        task.gradient(0)
        if loss is not None:
            watch.log(loss=loss)
        optimizer.step()
        seen.append(watch.skipped)
    return seen


def test_a_step_is_skipped_by_its_loss(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters())
    watch = attach(task.model, optimizer, policy(SKIP))
    assert steps(task, watch, optimizer, [1.0, 6.0, 5.0, math.inf, 2.0]) == [
        None, "loss", None, "loss", None,
    ]  # fmt: skip
    record = watch.history(4)[0]
    assert (record.fired, record.limits, record.scalars) == (("loss",), {"loss": 5.0}, {"loss": 6})


def test_a_step_without_a_loss_is_taken_and_said_once(task, attach, caplog):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, policy(SKIP))
    with caplog.at_level(logging.WARNING):
        assert steps(task, watch, optimizer, [None, None, 9.0]) == [None, None, "loss"]
    assert [r.getMessage() for r in caplog.records if "loss=loss" in r.getMessage()] == [
        "step 0: a rule compares the loss, and none was logged: call watch.log(loss=loss) before "
        "optimizer.step()"
    ]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_skip_step_rule_skips_as_its_definition_in_float64_does(task, attach, sign):
    draw = np.random.default_rng(0)
    losses = sign * 3 + 0.1 * draw.standard_normal(300)
    losses[[20, 150, 200, 260]] += 5.0
    rule = {
        "measure": "loss",
        "limit": {"z": 6, "space": "raw", "window": 128, "warmup": 64, "floor": 0, "learn": "raw"},
        "then": "skip",
        "name": "loss",
    }
    expected = []
    for step, loss in enumerate(losses):
        window = losses[max(0, step - 128) : step]
        known = len(window) >= 64
        over = known and loss > window.mean() + 6 * window.std(ddof=1)
        expected.append("loss" if over else None)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    watch = attach(task.model, optimizer, policy(rule))
    assert steps(task, watch, optimizer, losses.tolist()) == expected
    assert expected.count("loss") >= 2


def test_the_history_of_a_loss_is_saved_and_restored(task, attach):
    rule = {**SKIP, "limit": {"z": 3, "space": "raw", "warmup": 4}}
    losses = [1.0, 1.1, 0.9, 1.0, 1.05]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    first = attach(task.model, optimizer, policy(rule))
    steps(task, first, optimizer, losses)
    state = first.state_dict()
    first.close()
    second = attach(task.model, optimizer, policy(rule))
    second.load_state_dict(state)
    assert steps(task, second, optimizer, [1.02, 4.0]) == [None, "loss"]


@pytest.mark.parametrize("then", ["scale", "zero"])
def test_a_loss_cannot_be_scaled(then):
    with pytest.raises(gradwatch.PolicyError, match="then: skip, stop or warn where measure is"):
        load_policy(policy({**SKIP, "then": then}))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam", "RAdam"])
def test_an_update_is_the_gradient_over_the_root_of_its_second_moment(task, attach, name):
    rule = {"per": "tensor", "measure": "update", "limit": 1e9, "then": "warn"}
    optimizer = getattr(torch.optim, name)(task.model.parameters(), lr=1e-3)
    watch = attach(task.model, optimizer, policy(rule))
    group = optimizer.param_groups[0]
    decay = group["betas"][1] if "betas" in group else group["alpha"]
    moments = [torch.zeros_like(p, dtype=torch.float64) for p in task.model.parameters()]
    for step in range(4):
        task.gradient(step)
        grads = [p.grad.double().clone() for p in task.model.parameters()]
        moments = [decay * v + (1 - decay) * g * g for v, g in zip(moments, grads, strict=True)]
        optimizer.step()
        bias = 1 - decay ** (step + 1) if "betas" in group else 1.0
        updates = [
            g / (v / bias).sqrt().clamp(min=group["eps"])
            for g, v in zip(grads, moments, strict=True)
        ]
        expected = [0.0 if step == 0 else float(u.norm()) for u in updates]
        measured = watch.latest.measures["update"].tolist()
        assert measured == pytest.approx(expected, rel=1e-5)


def test_the_root_mean_square_of_an_update_is_that_of_stable_adamw(attach):
    """v = .01 and g = 1 give 10 (arXiv:2304.13013); here v is .01 with this gradient in it."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999))
    rule = {"per": "all", "measure": "update", "limit": 10.01, "then": "skip"}
    watch = attach(model, optimizer, policy(rule))
    optimizer.state[model.weight] = {
        "step": torch.tensor(1e6),
        "exp_avg": torch.zeros(8),
        "exp_avg_sq": torch.full((8,), (0.01 - 0.001) / 0.999),
    }
    for gradient, skipped in ((1.0, None), (1.01, "global")):
        model.weight.grad = torch.full((8,), gradient)
        state = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
        optimizer.step()
        assert watch.skipped == skipped
        optimizer.state[model.weight].update(state)
    rms = watch.history(2)[0].measures["update"][0] / math.sqrt(8)
    assert rms == pytest.approx(10.0, rel=1e-6)


def test_an_optimizer_without_second_moments_is_refused_with_its_line(task, attach, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nclip:\n  - {measure: update, limit: 3, then: warn}\n")
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    with pytest.raises(gradwatch.PolicyError, match=r":3:6: clip\[0\].measure: update needs"):
        attach(task.model, optimizer, str(path))
