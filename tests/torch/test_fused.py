"""Fused optimizers scale and drop by themselves: same numbers, and nothing left behind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradwatch.torch.fused import FusedSwitches, fits

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}
STEPS = 50
FUSED = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "dampening": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


def worst_difference(task, other) -> float:
    """Of parameters."""
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def state_of(optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
    values = itertools.chain.from_iterable(state.values() for state in states)
    return [value.clone() for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", FUSED)
def test_clipping_inside_the_kernel_equals_clipping_before_it(task, attach, name):
    other = task.copy()
    optimizer, plain = FUSED[name](task.model.parameters()), FUSED[name](other.model.parameters())
    watch = attach(task.model, optimizer, CLIP)
    assert watch.plan.fused
    for step in range(STEPS):
        task.gradient(step, 10.0)
        optimizer.step()
        other.gradient(step, 10.0)
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        plain.step()
    assert worst_difference(task, other) < 5e-7
    assert sum(record.clipped for record in watch.history(STEPS)) > STEPS / 2


@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_with_a_live_grad_scaler_the_numbers_and_its_scale_are_those_of_the_usual_loop(
    task, attach, name, unscaled_first
):
    def train(one, optimizer, scaler, watched: bool) -> list[float]:
        scales = []
        for step in range(STEPS):
            loss = forward(one, step)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if unscaled_first or not watched:
                scaler.unscale_(optimizer)
            if not watched:
                torch.nn.utils.clip_grad_norm_(one.model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    other = task.copy()
    optimizer, plain = FUSED[name](task.model.parameters()), FUSED[name](other.model.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=8) for _ in range(2)]
    watch = attach(task.model, optimizer, CLIP, scaler=scalers[0])
    ours = train(task, optimizer, scalers[0], watched=True)
    theirs = train(other, plain, scalers[1], watched=False)
    assert ours == theirs
    assert len(set(ours)) > 3
    assert worst_difference(task, other) < 5e-7
    norms = [record.total_norm for record in watch.history(STEPS)]
    assert max(norms) < 500  # not those of the scaled gradients
    assert [record.loss_scale for record in watch.history(2)] == ours[-3:-1]


def forward(one, step: int, gain: float = 10.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 20, (8, 6), generator=generator)
    target = torch.randint(0, 5, (8,), generator=generator)
    return torch.nn.functional.cross_entropy(one.model(tokens), target) * gain


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_a_skipped_step_leaves_parameters_and_state_bit_for_bit(task, attach, name, first):
    optimizer = FUSED[name](task.model.parameters())
    watch = attach(task.model, optimizer, CLIP)
    if not first:
        for step in range(2):
            task.gradient(step)
            optimizer.step()
    before, state = task.parameters(), state_of(optimizer)
    task.gradient(3)
    next(task.model.parameters()).grad[0, 0] = math.nan
    optimizer.step()
    assert watch.skipped == "nonfinite"
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, state_of(optimizer), strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_training_goes_on_after_a_skipped_first_step_as_if_it_had_not_been(task, attach, name):
    other = task.copy()
    optimizer, plain = FUSED[name](task.model.parameters()), FUSED[name](other.model.parameters())
    attach(task.model, optimizer, {"version": 1})
    task.gradient(0)
    next(task.model.parameters()).grad[0, 0] = math.inf
    optimizer.step()
    for step in range(1, 5):
        task.gradient(step)
        optimizer.step()
        other.gradient(step)
        plain.step()
    assert worst_difference(task, other) == 0


class TestSwitches:
    """The attributes are a loss scaler's: what was there comes back."""

    def make(self, **options):
        parameter = torch.nn.Parameter(torch.ones(4))
        parameter.grad = torch.ones(4)
        optimizer = torch.optim.SGD([parameter], lr=0.5, fused=True, **options)
        return parameter, optimizer, FusedSwitches(optimizer)

    def test_nothing_is_left_on_the_optimizer(self):
        _, optimizer, switches = self.make()
        before = set(vars(optimizer))
        switches.arm(divisor=torch.tensor(2.0), skip=torch.tensor(True))
        switches.disarm()
        assert set(vars(optimizer)) == before

    def test_a_scalers_own_scale_is_multiplied_and_put_back(self):
        parameter, optimizer, switches = self.make()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        switches.arm(divisor=torch.tensor(2.0))
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.full((4,), 1 - 0.5 / 8))
        switches.disarm()
        assert optimizer.grad_scale == 4.0
        assert optimizer.found_inf == 0.0

    @pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor(2.0), torch.tensor(0.5)])
    def test_any_true_value_drops_the_step(self, skip):
        parameter, optimizer, switches = self.make()
        switches.arm(skip=skip)
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.ones(4))

    def test_a_first_step_that_is_dropped_unread_does_not_leave_unset_momentum(self):
        parameter, optimizer, switches = self.make(momentum=0.9)
        switches.arm(skip=torch.tensor(1.0))
        optimizer.step()
        switches.disarm()
        parameter.grad = torch.ones(4)
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.full((4,), 0.5))

    def test_leftovers_of_a_step_that_raised_are_gone_before_the_next(self, task, attach):
        class Failing(Exception):
            pass

        def fail(*_):
            raise Failing

        optimizer = FUSED["adamw"](task.model.parameters())
        attach(task.model, optimizer, CLIP)
        handle = optimizer.register_step_pre_hook(fail)  # behind ours: the step never comes
        task.gradient(0, 100.0)
        with pytest.raises(Failing):
            optimizer.step()
        handle.remove()
        assert hasattr(optimizer, "grad_scale")
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(vars(optimizer).get("grad_scale")))
        task.gradient(1, 1e-6)
        optimizer.step()
        assert seen == [None]
        assert not hasattr(optimizer, "grad_scale")


def parameters():
    return [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_of_torch_fits(name):
    assert fits(FUSED[name](parameters()))


class MyAdam(torch.optim.Adam):
    """A subclass may do anything with a gradient."""


UNFIT = {
    "not fused": lambda: torch.optim.AdamW(parameters()),
    "foreach": lambda: torch.optim.AdamW(parameters(), foreach=True),
    "a subclass": lambda: MyAdam(parameters(), fused=True),
    "ignores the attributes": lambda: torch.optim.RMSprop(parameters()),
    "one group is not fused": lambda: torch.optim.SGD(
        [{"params": parameters(), "fused": True}, {"params": parameters(), "fused": False}], lr=0.1
    ),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", UNFIT)
def test_any_other_optimizer_does_not_and_is_clipped_before_its_step(name):
    assert not fits(UNFIT[name]())


def test_a_kernel_that_no_longer_divides_is_found_out(monkeypatch):
    original = torch.optim.SGD.step

    def deaf(self, closure=None):
        vars(self).pop("grad_scale", None)
        return original(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", deaf)
    assert not fits(torch.optim.SGD(parameters(), lr=0.1, fused=True))


def test_mixed_groups_are_clipped_all_the_same(task, attach):
    whole = list(task.model.parameters())
    groups = [{"params": whole[:3], "fused": True}, {"params": whole[3:], "fused": False}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0, 100.0)
    optimizer.step()
    norms = torch.stack([parameter.grad.norm() for parameter in whole])
    assert float(norms.norm()) == pytest.approx(1.0, rel=1e-6)
    assert not watch.plan.fused


def test_rules_that_scale_layers_differently_write_the_gradients_themselves(task, attach):
    optimizer = FUSED["adamw"](task.model.parameters())
    attach(task.model, optimizer, {"version": 1, "clip": [{"per": "layer", "limit": 0.1}]})
    task.gradient(0, 100.0)
    optimizer.step()
    assert float(task.model.head.weight.grad.norm()) < 0.1 * (1 + 1e-6)


def test_nothing_is_written_to_a_gradient_that_is_not_clipped(task, attach):
    optimizer = FUSED["adamw"](task.model.parameters())
    attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 1e9}]})
    task.gradient(0)
    versions = [p.grad._version for p in task.model.parameters()]
    optimizer.step()
    assert [p.grad._version for p in task.model.parameters()] == versions


def test_a_norm_that_no_float32_divisor_can_bring_down_is_clipped_all_the_same(attach):
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.zeros(100)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    attach(module, optimizer, CLIP)
    module.w.grad = torch.full((100,), 1e38)
    optimizer.step()
    assert float(module.w.detach().norm()) == pytest.approx(1.0, rel=1e-5)


def test_an_overflow_before_the_first_step_leaves_no_unset_momentum(task, attach):
    other = task.copy()
    results = []
    for one, overflow_first in ((task, True), (other, False)):
        optimizer = FUSED["momentum"](one.model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        if overflow_first:
            attach(one.model, optimizer, CLIP, scaler=scaler)
        for step in range(4):
            if step == 0 and not overflow_first:
                continue
            optimizer.zero_grad()
            loss = forward(one, step) * (math.inf if step == 0 else 1e-3)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(one.parameters())
    pairs = zip(*results, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-6


def test_after_a_step_that_raised_the_scalers_own_verdict_holds(task, attach):
    class Failing(Exception):
        pass

    def fail(*_):
        raise Failing

    optimizer = FUSED["sgd"](task.model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    policy = {"version": 1, "guard": {"nonfinite": "none"}, "clip": [{"limit": 1e-3}]}
    watch = attach(task.model, optimizer, policy, scaler=scaler)
    handle = optimizer.register_step_pre_hook(fail)
    scaler.scale(forward(task, 0)).backward()
    with pytest.raises(Failing):
        scaler.step(optimizer)
    handle.remove()
    scaler.update()
    optimizer.zero_grad()
    before = task.parameters()
    scaler.scale(forward(task, 1) * math.inf).backward()
    scaler.step(optimizer)
    assert watch.skipped == "overflow"
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


def test_nothing_stays_armed_when_parameters_are_added_after_a_step_that_raised(task, attach):
    class Failing(Exception):
        pass

    def fail(*_):
        raise Failing

    optimizer = FUSED["adamw"](task.model.parameters())
    watch = attach(task.model, optimizer, CLIP)
    handle = optimizer.register_step_pre_hook(fail)
    task.gradient(0, 100.0)
    with pytest.raises(Failing):
        optimizer.step()
    handle.remove()
    extra = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    task.gradient(1, 1e-6)
    optimizer.step()
    watch.close()
    assert not hasattr(optimizer, "grad_scale")
