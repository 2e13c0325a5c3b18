"""Rules per output unit and relative to weights, against loops over units and published vectors."""

from __future__ import annotations

import math

import pytest
import torch

import gradwatch

AGC = {"per": "unit", "measure": "weight", "limit": 0.5, "floor": 1e-3}


def stepped(attach, weight, gradient, rule, module=None):
    """The gradient that the optimizer saw."""
    model = module or torch.nn.Module()
    if module is None:
        model.weight = torch.nn.Parameter(torch.tensor(weight))
        model.weight.grad = torch.tensor(gradient)
    watch = attach(model, torch.optim.SGD(model.parameters(), lr=0.0), {"version": 1, "clip": rule})
    watch.process()
    return watch, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("weight", "gradient", "expected"),
    [
        ([3.0, 4.0], [7.0, 24.0], [0.7, 2.4]),
        ([[3.0, 4.0], [9.0, 40.0]], [[7.0, 24.0], [5.0, 12.0]], [[0.7, 2.4], [5.0, 12.0]]),
    ],
)
def test_adaptive_gradient_clipping_gives_the_published_vectors(attach, weight, gradient, expected):
    _, (grad,) = stepped(attach, weight, gradient, [AGC])
    assert torch.allclose(grad, torch.tensor(expected), rtol=1e-6)


MODULES = {
    "linear": (lambda: torch.nn.Linear(6, 4), (1,)),
    "conv": (lambda: torch.nn.Conv2d(3, 5, 3), (1, 2, 3)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(4, 3, 3), (0, 2, 3)),
    "embedding": (lambda: torch.nn.Embedding(7, 5), (1,)),
    "grouped": (lambda: torch.nn.Conv1d(4, 6, 3, groups=2), (1, 2)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("measure", ["weight", "l1", "l2", "linf", "rms"])
def test_a_unit_is_what_one_output_is_fed_by(attach, kind, measure):
    torch.manual_seed(0)
    make, dims = MODULES[kind]
    module = make()
    module.weight.grad = torch.randn_like(module.weight) * torch.rand_like(module.weight)
    grad, weight = (x.detach().double() for x in (module.weight.grad, module.weight))
    p = {"l1": 1.0, "linf": math.inf}.get(measure, 2.0)
    norm = torch.linalg.vector_norm(grad, p, dim=dims, keepdim=True)
    if measure == "weight":
        of_weight = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        norm = norm / of_weight.clamp(min=1e-3)
    if measure == "rms":
        norm = norm / math.sqrt(grad.numel() / norm.numel())
    limit = float(norm.median())
    expected = grad * (limit / norm).clamp(max=1)
    rule = {"params": "weight", "per": "unit", "measure": measure, "limit": limit}
    watch, (seen, *_) = stepped(attach, None, None, [rule], module)
    assert torch.allclose(seen.double(), expected, rtol=2e-6, atol=0)
    record = watch.latest
    assert record.clipped
    assert record.total_norm == pytest.approx(float(grad.norm()), rel=1e-6)
    assert record.total_norm_clipped == pytest.approx(float(expected.norm()), rel=1e-6)
    largest = record.measures["unit:per-unit"][0]
    assert largest == pytest.approx(float(norm.max()), rel=1e-6)


def test_units_of_a_grouped_transposed_convolution_are_its_output_channels(attach):
    torch.manual_seed(0)
    module = torch.nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    grad = torch.randn_like(module.weight)
    module.weight.grad = grad.clone()
    expected = grad.double().clone()
    for group in range(2):
        for out in range(3):
            unit = expected[2 * group : 2 * group + 2, out]
            unit *= min(1.0, 0.9 / float(unit.norm()))
    _, (seen,) = stepped(attach, None, None, [{"per": "unit", "limit": 0.9}], module)
    assert torch.allclose(seen.double(), expected, rtol=2e-6)


def test_only_the_rows_of_a_sparse_gradient_that_are_too_large_are_scaled(attach):
    torch.manual_seed(0)
    module = torch.nn.Embedding(9, 4, sparse=True)
    module(torch.tensor([2, 5, 5, 7])).square().sum().backward()
    dense = module.weight.grad.to_dense().double()
    norms = dense.norm(dim=1, keepdim=True)
    limit = float(norms[5] * 0.5)
    expected = dense * (limit / norms.clamp(min=1e-30)).clamp(max=1)
    _, (seen,) = stepped(attach, None, None, [{"per": "unit", "limit": limit}], module)
    assert torch.allclose(seen.to_dense().double(), expected, rtol=2e-6)


def test_a_rule_per_unit_sees_what_the_rules_above_left(task, attach):
    task.gradient(0, 100.0)
    raw = [p.grad.double().clone() for p in task.model.parameters()]
    total = torch.stack([g.norm() for g in raw]).norm()
    expected = [g / total for g in raw]
    for i, grad in enumerate(expected):
        dims = tuple(range(1, grad.ndim)) if grad.ndim > 1 else None
        norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
        expected[i] = grad * (0.05 / norm).clamp(max=1)
    total = torch.stack([g.norm() for g in expected]).norm()
    expected = [g * min(1.0, 0.2 / float(total)) for g in expected]
    rules = [{"limit": 1.0, "eps": 0}, {"per": "unit", "limit": 0.05}, {"limit": 0.2, "eps": 0}]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0)
    watch = attach(task.model, optimizer, {"version": 1, "clip": rules})
    watch.process()
    for parameter, due in zip(task.model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad.double(), due, rtol=2e-6, atol=1e-12)
    assert watch.latest.total_norm_clipped == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("then", ["scale", "zero", "skip", "warn"])
def test_shadow_mode_leaves_units_alone_and_says_what_it_would_do(task, attach, then):
    task.gradient(0, 100.0)
    before = [p.grad.clone() for p in task.model.parameters()]
    rule = {"per": "unit", "limit": 0.05, "then": then}
    policy = {"version": 1, "mode": "shadow", "clip": [rule]}
    watch = attach(task.model, torch.optim.SGD(task.model.parameters(), lr=1.0), policy)
    watch.process()
    for parameter, was in zip(task.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, was)
    assert watch.latest.fired == ("per-unit",)
    assert watch.latest.clipped == (then in ("scale", "zero"))


def test_a_unit_beside_one_that_is_not_finite_is_clipped_all_the_same(attach):
    gradient = [[math.nan, 1.0], [6.0, 8.0]]
    rule = [{"per": "unit", "limit": 1.0, "then": "scale"}]
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2, 2))
    model.weight.grad = torch.tensor(gradient)
    policy = {"version": 1, "guard": {"nonfinite": "none"}, "clip": rule}
    attach(model, torch.optim.SGD(model.parameters(), lr=0.0), policy).process()
    assert model.weight.grad[1].tolist() == pytest.approx([0.6, 0.8])
    assert math.isnan(model.weight.grad[0, 0])


def test_zeroing_a_unit_zeroes_also_its_nan(attach):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2, 2))
    model.weight.grad = torch.tensor([[math.nan, 1.0], [0.6, 0.8]])
    policy = {
        "version": 1,
        "guard": {"nonfinite": "none"},
        "clip": [{"per": "unit", "limit": 2.0, "then": "zero"}],
    }
    attach(model, torch.optim.SGD(model.parameters(), lr=0.0), policy).process()
    assert model.weight.grad.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]


def test_norms_of_units_beyond_float32_are_taken_in_float64(attach):
    gradient = [[3e30, 4e30], [3.0, 4.0]]
    _, (grad,) = stepped(attach, [[1.0, 1.0]] * 2, gradient, [{"per": "unit", "limit": 5.0}])
    assert grad.tolist()[0] == pytest.approx([3.0, 4.0], rel=1e-5)
    assert grad.tolist()[1] == pytest.approx([3.0, 4.0], rel=1e-6)


def test_each_unit_learns_a_limit_of_its_own(task, attach):
    rule = {"per": "unit", "limit": {"ratio": 2.0, "warmup": 3}}
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    watch = attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    for step in range(4):
        task.gradient(0)
        if step == 3:
            task.model.head.weight.grad[2] *= 10
            before = task.model.head.weight.grad.clone()
        optimizer.step()
    after = task.model.head.weight.grad
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert torch.allclose(after[2], before[2] / 5, rtol=1e-5)
    state = watch.state_dict()["engine"]["rules"]["per-unit"]
    assert "head.weight[2]" in state["units"]
    assert "norm.bias[0]" in state["units"]  # a vector is one unit


@pytest.mark.parametrize("per", ["all", "layer", "tensor"])
def test_a_norm_relative_to_the_weights_is_clipped_by_them(task, attach, per):
    task.gradient(0, 10.0)
    named = dict(task.model.named_parameters())
    parts = {"all": [list(named)], "tensor": [[name] for name in named]}.get(per)
    if parts is None:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in named)
        parts = [[n for n in named if n.rpartition(".")[0] == layer] for layer in layers]
    expected = {}
    for part in parts:
        grad = math.sqrt(sum(float(named[n].grad.double().norm() ** 2) for n in part))
        weight = math.sqrt(sum(float(named[n].detach().double().norm() ** 2) for n in part))
        coef = min(1.0, 0.05 / (grad / max(weight, 0.5)))
        expected |= {n: named[n].grad.double() * coef for n in part}
    rule = {"per": per, "measure": "weight", "limit": 0.05, "floor": 0.5}
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0)
    watch = attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    watch.process()
    for name, due in expected.items():
        assert torch.allclose(named[name].grad.double(), due, rtol=2e-6, atol=0), name
    weights = [float(p.detach().norm()) for p in named.values()]
    assert watch.latest.measures["weight"].tolist() == pytest.approx(weights, rel=1e-6)


def test_clip_grads_knows_units_and_weights_too():
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [9.0, 40.0]]))
    model.weight.grad = torch.tensor([[7.0, 24.0], [5.0, 12.0]])
    gradwatch.clip_grads_(model, {"version": 1, "clip": [{**AGC, "limit": 0.5}]})
    assert torch.allclose(model.weight.grad, torch.tensor([[0.7, 2.4], [5.0, 12.0]]))
    with pytest.raises(gradwatch.PolicyError, match="attach a watch"):
        gradwatch.clip_grads_(
            model,
            {"version": 1, "clip": [{"measure": "loss", "limit": 1.0, "then": "skip"}]},
        )
