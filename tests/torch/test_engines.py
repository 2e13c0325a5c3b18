"""Containers of optimizers that work, and engines that cannot: small stand-ins for both."""

from __future__ import annotations

import copy

import pytest
import torch

import gradwatch
from gradwatch.torch.containers import learning_rate

CLIP = {"version": 1, "clip": [{"limit": 0.5}]}


class Container(torch.optim.Optimizer):
    """Like torchtitan's: an optimizer over all parameters, which steps one for each model part."""

    def __init__(self, parts, lr: float = 0.1) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=lr) for part in parts]
        everything = [p for part in parts for p in part.parameters()]
        super().__init__(everything, {"lr": lr})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class OptimizersInBackwardContainer(Container):
    """Steps while gradients come in; its own step does nothing."""

    def step(self, closure=None):
        pass


def parts_of(task):
    return [task.model.embed, task.model.conv], [task.model.norm, task.model.head]


def containers(task):
    return Container([torch.nn.ModuleList(part) for part in parts_of(task)])


class TestContainer:
    def test_all_parts_are_clipped_as_one_vector(self, task, attach):
        other = task.copy()
        ours, theirs = containers(task), containers(other)
        watch = attach(task.model, ours, CLIP)
        for step in range(4):
            for one, optimizer in ((task, ours), (other, theirs)):
                optimizer.zero_grad()
                one.gradient(step, 10.0)
            norm = torch.nn.utils.clip_grad_norm_(other.model.parameters(), 0.5)
            ours.step()
            theirs.step()
            assert watch.latest.total_norm == pytest.approx(float(norm), rel=1e-6)
            assert watch.latest.clipped
        pairs = zip(task.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert watch.info.layout.layers == ("embed", "conv", "norm", "head")

    def test_a_skipped_step_leaves_the_state_of_each_inner_optimizer(self, task, attach):
        optimizer = containers(task)
        watch = attach(task.model, optimizer, {"version": 1})
        task.gradient(0)
        optimizer.step()
        before = task.parameters(), copy.deepcopy([o.state_dict() for o in optimizer.optimizers])
        task.gradient(1)
        task.model.head.bias.grad[0] = float("nan")
        optimizer.step()
        assert watch.skipped == "nonfinite"
        pairs = zip(before[0], task.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        steps = [
            float(state["step"]) for one in optimizer.optimizers for state in one.state.values()
        ]
        assert set(steps) == {1.0}

    def test_the_learning_rate_is_the_one_that_schedules_act_on(self, task, attach):
        optimizer = containers(task)
        watch = attach(task.model, optimizer)
        for inner in optimizer.optimizers:
            inner.param_groups[0]["lr"] = 0.025
        task.gradient(0)
        optimizer.step()
        assert watch.latest.learning_rate == 0.025
        assert learning_rate(None) != learning_rate(None)

    def test_a_clip_function_of_the_loop_has_the_norm_that_the_watch_is_denied(self, task, attach):
        """Documented: it runs before step(), so the loop must drop it or `process` before it."""
        watch = attach(task.model, None, {**CLIP, "mode": "shadow"})
        optimizer = containers(task)
        task.gradient(0, 10.0)
        watch.process()
        norm = torch.nn.utils.clip_grad_norm_(task.model.parameters(), 0.5)
        optimizer.step()
        assert watch.latest.total_norm == pytest.approx(float(norm), rel=1e-6)

    def test_one_that_steps_in_the_backward_pass_is_refused(self, task, attach):
        optimizer = OptimizersInBackwardContainer([task.model])
        with pytest.raises(
            gradwatch.AttachError, match="OptimizersInBackwardContainer updates parameters inside"
        ):
            attach(task.model, optimizer)


def engine_class(package: str, name: str, **body) -> type:
    return type(name, (), {"__module__": f"{package}.runtime", **body})


class TestEngines:
    """They are no torch optimizers, and hide one over flat buffers under `.optimizer`."""

    @pytest.mark.parametrize(
        ("package", "name", "way_out"),
        [
            ("deepspeed", "DeepSpeedZeroOptimizer", r"engine.get_global_grad_norm\(\)"),
            ("megatron", "DistributedOptimizer", "--clip-grad clips"),
            ("fairscale", "OSS", "Attach where a plain torch optimizer takes the step"),
        ],
    )
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_an_engines_optimizer_is_refused_also_inside_a_wrapper(
        self, task, attach, package, name, way_out, wrapped
    ):
        inner = engine_class(package, name)()
        flat = torch.nn.Parameter(torch.zeros(9))
        inner.optimizer = torch.optim.AdamW([flat])
        optimizer = inner
        if wrapped:  # as Accelerate does
            optimizer = type("DeepSpeedOptimizerWrapper", (), {})()
            optimizer.optimizer = inner
        with pytest.raises(gradwatch.AttachError, match=f"{package}'s {name} keeps .*{way_out}"):
            attach(task.model, optimizer)

    def test_an_engines_adam_without_the_engine_is_a_plain_optimizer(self, task, attach):
        adam = type("FusedAdam", (torch.optim.Adam,), {"__module__": "deepspeed.ops.adam"})
        optimizer = adam(task.model.parameters())
        watch = attach(task.model, optimizer, CLIP)
        task.gradient(0)
        optimizer.step()
        assert watch.latest.step == 0


class Wrapped:
    """A prepared optimizer, with a scaler of its own."""

    def __init__(self, optimizer, scaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler


@pytest.mark.parametrize("scaler", [None, "no scaler", torch.amp.GradScaler("cpu")])
def test_the_scaler_of_a_wrapped_optimizer_is_found(task, attach, scaler):
    optimizer = Wrapped(Wrapped(torch.optim.SGD(task.model.parameters()), scaler), None)
    watch = attach(task.model, optimizer)
    task.gradient(0)
    optimizer.optimizer.optimizer.step()
    found = isinstance(scaler, torch.amp.GradScaler)
    assert (watch.latest.loss_scale == 2.0**16) == found
