"""The tasks and what can be broken of them."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.demo.digits import digits_task
from gradwatch.demo.faults import FAULTS
from gradwatch.demo.gpt import gpt_task
from gradwatch.demo.task import Task
from gradwatch.demo.text import ALPHABET, encode, stdlib_text

TASKS = {"digits": digits_task, "gpt": gpt_task}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param](0)


def loss_of(task: Task) -> torch.Tensor:
    inputs, targets = next(task.batches)
    task.optimizer.zero_grad()
    loss = task.criterion(task.model(inputs), targets)
    loss.backward()
    return loss.detach()


def norms(task: Task) -> dict[str, float]:
    return {
        name: float(parameter.grad.norm())
        for name, parameter in task.model.named_parameters()
        if parameter.grad is not None
    }


def test_a_seed_gives_the_same_run_and_another_seed_another(task):
    make = TASKS[task.name]
    assert loss_of(task) == loss_of(make(0)) != loss_of(make(1))


def test_an_untrained_model_guesses(task):
    """The loss of even odds; initial weights and label smoothing shift it a little."""
    classes = {"digits": 10, "gpt": len(ALPHABET)}[task.name]
    assert float(loss_of(task)) == pytest.approx(math.log(classes), rel=0.15)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_the_task_as_it_was(task, name):
    rates = [group["lr"] for group in task.optimizer.param_groups]
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    with FAULTS[name].breaking(task):
        loss_of(task)
    assert [group["lr"] for group in task.optimizer.param_groups] == rates
    for module in (*task.model.modules(), task.criterion):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for key, value in task.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_lr_fault_multiplies_the_learning_rate_by_100(task):
    rate = task.optimizer.param_groups[0]["lr"]
    with FAULTS["lr"].breaking(task):
        assert task.optimizer.param_groups[0]["lr"] == pytest.approx(100 * rate)


def test_one_nan_reaches_loss_and_gradients(task):
    with FAULTS["nan"].breaking(task):
        assert math.isnan(loss_of(task))
    assert any(math.isnan(norm) for norm in norms(task).values())


def test_the_loss_fault_multiplies_every_gradient_by_1000():
    one, other = digits_task(0), digits_task(0)
    loss_of(one)
    with FAULTS["loss"].breaking(other):
        loss_of(other)
    for name, norm in norms(one).items():
        assert norms(other)[name] == pytest.approx(1000 * norm, rel=1e-4)


def test_a_silent_layer_gets_no_gradient_and_the_head_still_does(task):
    with FAULTS["dead"].breaking(task):
        loss_of(task)
    dead = {
        name
        for name, _ in task.model.named_modules()
        if task.model.get_submodule(name) is task.victim
    }
    found = norms(task)
    for name in dead:
        assert found[f"{name}.weight"] == 0
    assert found["head.bias"] > 0


def test_python_brings_enough_text_and_all_of_it_can_be_read():
    text = stdlib_text()
    assert len(text) > 500_000
    assert "Copyright" in text
    assert set(encode(text[:10_000] + "é→")) <= set(range(len(ALPHABET)))


def test_reading_is_one_code_a_character_and_can_be_undone():
    line = "def f(x):\n    return x"
    assert "".join(ALPHABET[code] for code in encode(line)) == line
