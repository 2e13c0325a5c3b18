"""Every measure and scope on real gradients, against float64 written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

MEASURES = ["l1", "l2", "linf", "l3", "l1.5", "rms"]


def sgd(task, **options):
    return torch.optim.SGD(task.model.parameters(), lr=1.0, **options)


def grouped(task):
    """Two parameter groups."""
    whole = list(task.model.parameters())
    return torch.optim.SGD([{"params": whole[:3]}, {"params": whole[3:]}], lr=1.0)


def gradients(task, dtype=torch.float64) -> list[torch.Tensor]:
    return [parameter.grad.detach().to(dtype).clone() for parameter in task.model.parameters()]


def measured(tensors: list[torch.Tensor], measure: str) -> float:
    flat = np.abs(np.concatenate([tensor.double().numpy().ravel() for tensor in tensors]))
    if measure == "linf":
        return float(flat.max())
    if measure == "rms":
        return math.sqrt(float(np.mean(flat**2)))
    p = float(measure[1:])
    return float(np.sum(flat**p) ** (1 / p))


def units(task, per: str) -> list[list[int]]:
    names = [name for name, _ in task.model.named_parameters()]
    if per == "all":
        return [list(range(len(names)))]
    if per == "tensor":
        return [[i] for i in range(len(names))]
    if per == "group":
        return [[0, 1, 2], list(range(3, len(names)))]
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [[i for i, n in enumerate(names) if n.rpartition(".")[0] == one] for one in layers]


def worst_error(task, expected: list[torch.Tensor]) -> float:
    """Relative to the norm of each tensor."""
    pairs = zip(gradients(task), expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0)


@pytest.mark.parametrize("per", ["all", "group", "layer", "tensor"])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_rule_scales_each_unit_to_its_limit(task, attach, per, measure):
    task.gradient(0, 100.0)
    raw = gradients(task)
    found = [measured([raw[i] for i in unit], measure) for unit in units(task, per)]
    limit = float(np.median(found)) / (2 if per == "all" else 1)
    optimizer = grouped(task)
    rule = {"per": per, "measure": measure, "limit": limit, "eps": 0}
    watch = attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    optimizer.step()
    expected = [tensor.clone() for tensor in raw]
    for unit, value in zip(units(task, per), found, strict=True):
        for i in unit:
            expected[i] *= min(1.0, limit / value)
    bar = 2e-6 if measure in ("l3", "l1.5") else 1e-6
    assert worst_error(task, expected) < bar
    record = watch.latest
    assert record.clipped
    norms = torch.tensor([tensor.norm() for tensor in expected])
    assert record.total_norm_clipped == pytest.approx(float(norms.norm()), rel=2e-6)


def test_clip_by_value_is_torchs_to_the_bit(task, attach):
    other = task.copy()
    task.gradient(0, 100.0)
    other.gradient(0, 100.0)
    optimizer = sgd(task)
    watch = attach(
        task.model, optimizer, {"version": 1, "clip": [{"per": "element", "limit": 0.5}]}
    )
    optimizer.step()
    torch.nn.utils.clip_grad_value_(other.model.parameters(), 0.5)
    pairs = zip(task.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    record = watch.latest
    assert record.clipped
    after = torch.stack([p.grad.norm() for p in other.model.parameters()])
    assert record.total_norm_clipped == pytest.approx(float(after.norm()), rel=1e-6)
    assert record.tensor_coefs_P * record.tensor_norms_P == pytest.approx(after.numpy(), rel=1e-6)


def test_elements_within_the_limit_cost_no_write(task, attach):
    task.gradient(0)
    versions = [p.grad._version for p in task.model.parameters()]
    optimizer = sgd(task)
    attach(task.model, optimizer, {"version": 1, "clip": [{"per": "element", "limit": 1e6}]})
    optimizer.step()
    assert [p.grad._version for p in task.model.parameters()] == versions


def test_elements_are_clipped_in_their_place_in_the_chain(task, attach):
    task.gradient(0, 100.0)
    raw = gradients(task)
    rules = [{"limit": 10.0, "eps": 0}, {"per": "element", "limit": 0.5}, {"limit": 2.0, "eps": 0}]
    optimizer = sgd(task)
    attach(task.model, optimizer, {"version": 1, "clip": rules})
    optimizer.step()
    total = measured(raw, "l2")
    scaled = [(tensor * min(1, 10 / total)).clamp(-0.5, 0.5) for tensor in raw]
    total = measured(scaled, "l2")
    expected = [tensor * min(1, 2 / total) for tensor in scaled]
    assert worst_error(task, expected) < 1e-6


def test_complex_elements_keep_their_phase(attach):
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    module = torch.nn.Module()
    module.register_parameter("w", parameter)
    parameter.grad = torch.tensor([3 + 4j, 0.1j, 0])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    attach(module, optimizer, {"version": 1, "clip": [{"per": "element", "limit": 1.0}]})
    optimizer.step()
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6 + 0.8j, 0.1j, 0]))


def test_zero_makes_units_over_the_limit_zero_and_leaves_the_others(task, attach):
    task.gradient(0, 100.0)
    raw = gradients(task)
    norms = [measured([tensor], "l2") for tensor in raw]
    limit = float(np.median(norms)) * 1.001
    optimizer = sgd(task)
    rule = {"per": "tensor", "limit": limit, "then": "zero"}
    watch = attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    optimizer.step()
    for tensor, norm, before in zip(gradients(task), norms, raw, strict=True):
        assert torch.equal(tensor, torch.zeros_like(tensor) if norm > limit else before)
    assert watch.latest.clipped
    assert set(watch.latest.tensor_coefs_P.tolist()) == {0.0, 1.0}


def test_a_tensor_that_is_not_finite_is_zeroed_where_the_guard_says_so(task, attach):
    task.gradient(0)
    head = task.model.head.weight
    head.grad[0, 0] = math.nan
    others = measured([g for g in gradients(task) if torch.isfinite(g).all()], "l2")
    optimizer = sgd(task)
    policy = {
        "version": 1,
        "guard": {"nonfinite": "zero"},
        "clip": [{"limit": others / 2, "eps": 0}],
    }
    watch = attach(task.model, optimizer, policy)
    optimizer.step()
    assert not head.grad.any()
    assert measured(gradients(task), "l2") == pytest.approx(others / 2, rel=1e-6)
    assert watch.skipped is None
    assert math.isnan(watch.latest.total_norm)
    assert watch.latest.total_norm_clipped == pytest.approx(others / 2, rel=1e-6)


def test_elements_over_the_limit_are_zeroed_and_nan_too(task, attach):
    task.gradient(0, 100.0)
    raw = gradients(task, torch.float32)
    optimizer = sgd(task)
    rule = {"per": "element", "limit": 0.5, "then": "zero"}
    attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    optimizer.step()
    for after, before in zip(gradients(task, torch.float32), raw, strict=True):
        assert torch.equal(after, torch.where(before.abs() <= 0.5, before, 0.0))


@pytest.mark.parametrize("then", ["skip", "stop", "warn"])
def test_an_element_over_the_limit_can_skip_stop_or_warn(task, attach, then, caplog):
    import gradwatch

    task.gradient(0, 100.0)
    before = task.parameters()
    optimizer = sgd(task)
    rule = {"per": "element", "limit": 0.5, "then": then, "name": "largest"}
    watch = attach(task.model, optimizer, {"version": 1, "clip": [rule]})
    if then == "stop":
        with pytest.raises(gradwatch.TrainingStopped) as stopped:
            optimizer.step()
        assert stopped.value.reason == "largest"
    else:
        optimizer.step()
    assert watch.skipped == ("largest" if then == "skip" else None)
    assert watch.latest.fired == ("largest",)
    if then != "warn":
        assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


SELECTORS = {
    "exclude": ({"exclude": "head.*"}, lambda name, p: not name.startswith("head")),
    "params": ({"params": ["conv.*", "norm"]}, lambda name, p: name[:4] in ("conv", "norm")),
    "types": ({"types": "Embedding"}, lambda name, p: name.startswith("embed")),
    "ndim": ({"ndim": ">=2"}, lambda name, p: p.ndim >= 2),
    "groups": ({"groups": [1]}, lambda name, p: name[:4] in ("norm", "head")),
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_selector_chooses_what_is_clipped(task, attach, kind):
    keys, chosen = SELECTORS[kind]
    task.gradient(0, 100.0)
    raw = gradients(task)
    named = dict(task.model.named_parameters())
    picks = [chosen(name, parameter) for name, parameter in named.items()]
    assert any(picks)
    assert not all(picks)
    total = measured([g for g, pick in zip(raw, picks, strict=True) if pick], "l2")
    optimizer = grouped(task)
    attach(task.model, optimizer, {"version": 1, "clip": [{**keys, "limit": total / 4, "eps": 0}]})
    optimizer.step()
    expected = [g / 4 if pick else g for g, pick in zip(raw, picks, strict=True)]
    assert worst_error(task, expected) < 1e-6


@pytest.mark.parametrize("rule", [{"per": "element", "limit": 0.1}, {"limit": 1e-3}])
def test_in_shadow_nothing_is_touched_and_the_same_is_reported(task, attach, rule):
    other = task.copy()
    records = []
    for one, mode in ((task, "enforce"), (other, "shadow")):
        one.gradient(0, 100.0)
        optimizer = sgd(one)
        raw = gradients(one)
        watch = attach(one.model, optimizer, {"version": 1, "mode": mode, "clip": [rule]})
        optimizer.step()
        records.append(watch.latest)
        touched = any(not torch.equal(a, b) for a, b in zip(gradients(one), raw, strict=True))
        assert touched is (mode == "enforce")
    enforced, shadowed = records
    assert shadowed.total_norm_clipped == enforced.total_norm_clipped
    assert np.array_equal(shadowed.tensor_coefs_P, enforced.tensor_coefs_P)


def one_tensor(attach, policy, values: list[float]) -> tuple[torch.Tensor, object]:
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.zeros(len(values))))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    watch = attach(module, optimizer, {"version": 1, **policy})
    module.w.grad = torch.tensor(values)
    optimizer.step()
    return module.w.grad, watch.latest


def test_elements_are_clipped_also_beside_one_that_is_not_finite(attach):
    policy = {"guard": {"nonfinite": "none"}, "clip": [{"per": "element", "limit": 0.5}]}
    grad, _ = one_tensor(attach, policy, [9.0, -9.0, math.inf, 0.1])
    assert grad.tolist() == pytest.approx([0.5, -0.5, 0.5, 0.1])
    grad, _ = one_tensor(attach, policy, [9.0, math.nan])
    assert grad[0] == 0.5
    assert math.isnan(grad[1])


def test_an_element_is_zeroed_by_its_raw_value_behind_a_tight_clip(attach):
    rules = [{"per": "tensor", "limit": 1.0}, {"per": "element", "limit": 2.0, "then": "zero"}]
    grad, record = one_tensor(attach, {"clip": rules}, [9.0, 0.1, 0.1])
    assert grad[0] == 0
    assert len(record.fired) == 2


def test_a_tensor_that_the_guard_zeroed_is_recorded_as_zero_also_beside_element_rules(attach):
    policy = {"guard": {"nonfinite": "zero"}, "clip": [{"per": "element", "limit": 0.5}]}
    grad, record = one_tensor(attach, policy, [9.0, math.nan])
    assert not grad.any()
    assert record.clipped
    assert record.tensor_coefs_P.tolist() == [0.0]
    assert record.total_norm_clipped == 0


def test_a_total_that_leaves_float32_where_no_tensor_does_is_clipped_not_skipped(attach):
    module = torch.nn.Module()
    for i in range(50):
        module.register_parameter(f"w{i}", torch.nn.Parameter(torch.zeros(10)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    watch = attach(module, optimizer, {"version": 1, "clip": [{"limit": 1.0}]})
    for parameter in module.parameters():
        parameter.grad = torch.full((10,), 2e18)
    optimizer.step()
    assert watch.skipped is None
    assert watch.latest.total_norm == pytest.approx(2e18 * math.sqrt(500), rel=1e-6)
    norm = torch.stack([parameter.detach().norm() for parameter in module.parameters()]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-5)


def test_float64_gradients_beyond_float32_are_clipped_not_zeroed(attach):
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    attach(module, optimizer, {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]})
    module.w.grad = torch.full((4,), 1e50, dtype=torch.float64)
    optimizer.step()
    assert float(module.w.detach().norm()) == pytest.approx(1.0, rel=1e-12)
