"""Vectors that other libraries publish in their own tests, through a real optimizer.

Composer's, for adaptive clipping, are in test_units.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.policy import load_policy

UPDATES = [[500.0, 5.0], [300.0, 3.0]]


@pytest.fixture
def applied(attach):
    """What SGD of rate 1 subtracts, for the gradients given, one step after the other."""

    def run(policy, *steps):
        weights = torch.nn.ParameterList(torch.zeros(len(g)) for g in steps[0])
        optimizer = torch.optim.SGD(weights, lr=1.0)
        watch = attach(weights, optimizer, load_policy({"version": 1, **policy}))
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = torch.tensor(gradient)
            optimizer.step()
            optimizer.zero_grad()
        return watch, [(-w.detach()).tolist() for w in weights]

    return run


@pytest.mark.parametrize("i", range(1, 51))
def test_optax_an_update_clipped_to_one_over_i_has_that_norm_and_is_left_alone_again(applied, i):
    policy = {"clip": [{"limit": 1 / i, "eps": 0}]}
    _, once = applied(policy, UPDATES)
    assert math.hypot(*once[0], *once[1]) == pytest.approx(1 / i, rel=1e-6)
    _, twice = applied(policy, once)
    assert [*twice[0], *twice[1]] == pytest.approx([*once[0], *once[1]], rel=1e-6)


@pytest.mark.parametrize("i", range(1, 51))
def test_optax_a_block_clipped_to_a_root_mean_square_of_one_over_i_has_it(applied, i):
    _, blocks = applied({"clip": [{"use": "block-rms", "limit": 1 / i}]}, UPDATES)
    for block in blocks:
        assert math.hypot(*block) / math.sqrt(2) == pytest.approx(1 / i, rel=1e-6)


@pytest.mark.parametrize("i", range(1, 51))
def test_optax_an_element_is_clipped_to_its_value(applied, i):
    policy = {"clip": [{"per": "element", "limit": 1 / i}]}
    _, clipped = applied(policy, [[500.0, -5.0], [300.0, -3.0]])
    assert [*clipped[0], *clipped[1]] == pytest.approx([1 / i, -1 / i, 1 / i, -1 / i], rel=1e-6)


def test_optax_four_micro_batches_of_1_2_3_and_4_are_one_update_of_their_mean(applied):
    watch, (weight,) = applied({"accumulate": {"steps": 4}}, [[1.0]], [[2.0]], [[3.0]], [[4.0]])
    assert weight == [2.5]
    assert watch.latest.micro_batches == 4


def test_keras_clipnorm_is_of_each_variable(applied):
    policy = {"clip": [{"use": "keras-clipnorm"}]}
    _, clipped = applied(policy, [[3.0, 4.0], [0.0, 12.0]])
    assert [*clipped[0], *clipped[1]] == pytest.approx([0.6, 0.8, 0.0, 1.0], rel=1e-6)
    _, (alone,) = applied(policy, [[100.0, 100.0]])
    assert alone == pytest.approx([0.7071, 0.7071], abs=5e-5)


def test_keras_global_clipnorm_is_of_all_of_them(applied):
    _, clipped = applied({"clip": [{"limit": 1.0, "eps": 0}]}, [[3.0, 4.0], [0.0, 12.0]])
    assert [*clipped[0], *clipped[1]] == pytest.approx([3 / 13, 4 / 13, 0.0, 12 / 13], rel=1e-6)
