"""The same training as with torch's own clipping, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}

EVERY_OPTIMIZER = [
    getattr(torch.optim, name)
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


def clipped_by_torch(task, optimizer, steps, gain):
    for step in range(steps):
        task.gradient(step, gain)
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
    return task.parameters()


def clipped_by_gradwatch(task, optimizer, steps, gain):
    for step in range(steps):
        task.gradient(step, gain)
        optimizer.step()
    return task.parameters()


@pytest.mark.parametrize("gain", [0.1, 10.0], ids=["seldom clipped", "always clipped"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_limit_of_one_is_clip_grad_norm_to_the_bit_over_50_steps(task, attach, make, gain):
    other = task.copy()
    expected = clipped_by_torch(other, make(other.model.parameters()), 50, gain)
    optimizer = make(task.model.parameters())
    watch = attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 1.0}]})
    actual = clipped_by_gradwatch(task, optimizer, 50, gain)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert any(record.clipped for record in watch.history(50)) or gain < 1


def test_parameters_without_a_gradient_keep_the_bits_equal(task, attach):
    for model in (task.model, (other := task.copy()).model):
        model.norm.requires_grad_(False)
    make = OPTIMIZERS["adamw"]
    expected = clipped_by_torch(other, make(other.model.parameters()), 10, 10.0)
    optimizer = make(task.model.parameters())
    attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 1.0}]})
    actual = clipped_by_gradwatch(task, optimizer, 10, 10.0)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_without_eps_one_clip_differs_from_torch_by_less_than_3e_7(task, attach):
    other = task.copy()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0)
    attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 0.01, "eps": 0}]})
    before = task.parameters()
    task.gradient(0, 10.0)
    optimizer.step()
    other.gradient(0, 10.0)
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in other.model.parameters()))
    reference = [p.grad.double() * (0.01 / norm) for p in other.model.parameters()]
    clipped = [p.grad.double() for p in task.model.parameters()]
    assert len(before) == len(clipped)
    for actual, expected in zip(clipped, reference, strict=True):
        error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)
        assert error < 3e-7


def made(kind, parameters):
    parameters = list(parameters)
    if kind is torch.optim.Muon:
        return kind([p for p in parameters if p.ndim == 2])
    return kind(parameters, lr=1e-2)


@pytest.mark.parametrize("kind", EVERY_OPTIMIZER, ids=lambda kind: kind.__name__)
def test_a_skipped_step_leaves_parameters_and_state_bit_identical(task, attach, kind):
    optimizer = made(kind, task.model.parameters())
    watch = attach(task.model, optimizer, {"version": 1})
    for step in range(3):
        task.gradient(step)
        optimizer.step()
    parameters, state = task.parameters(), copy.deepcopy(optimizer.state_dict())
    task.gradient(3)
    next(p for p in task.model.parameters() if p.ndim == 2).grad[0, 0] = torch.nan
    optimizer.step()
    assert watch.skipped == "nonfinite"
    assert all(torch.equal(a, b) for a, b in zip(parameters, task.parameters(), strict=True))
    assert_equal_state(state, optimizer.state_dict())
    task.gradient(4)
    optimizer.step()
    assert watch.skipped is None
    assert not all(torch.equal(a, b) for a, b in zip(parameters, task.parameters(), strict=True))


@pytest.mark.parametrize("kind", EVERY_OPTIMIZER, ids=lambda kind: kind.__name__)
def test_the_very_first_step_can_be_skipped(task, attach, kind):
    other = task.copy()
    optimizer, expected = made(kind, task.model.parameters()), made(kind, other.model.parameters())
    attach(task.model, optimizer, {"version": 1})
    task.gradient(0)
    next(p for p in task.model.parameters() if p.ndim == 2).grad[0, 0] = torch.inf
    optimizer.step()
    for step in range(1, 4):
        torch.manual_seed(step)  # an optimizer may draw
        task.gradient(step)
        optimizer.step()
        torch.manual_seed(step)
        other.gradient(step)
        expected.step()
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def assert_equal_state(expected, actual):
    assert expected["param_groups"] == actual["param_groups"]
    assert expected["state"].keys() == actual["state"].keys()
    for key, values in expected["state"].items():
        for name, value in values.items():
            found = actual["state"][key][name]
            same = torch.equal(value, found) if torch.is_tensor(value) else value == found
            assert same, f"state {key}.{name} changed"


def test_observing_leaves_training_bit_identical(task, attach):
    other = task.copy()
    make = OPTIMIZERS["adamw"]
    plain, optimizer = make(other.model.parameters()), make(task.model.parameters())
    attach(task.model, optimizer)
    for step in range(20):
        task.gradient(step, 100.0)
        optimizer.step()
        other.gradient(step, 100.0)
        plain.step()
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True)
    )
