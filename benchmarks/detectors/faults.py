"""Every fault with its provocation, the kinds that are to catch it, and its healthy twin."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.detectors.runs import Hook, Loop, inner_linear
from benchmarks.detectors.tasks import Task

BEGIN = 250


@dataclass(kw_only=True)
class Fault:
    """What breaks, and who is to say so."""

    kinds: tuple[str, ...]
    """One of them is enough."""

    hook: Hook | None = None
    prepare: Callable[[Task], Any] = lambda task: None
    models: tuple[str, ...] = ("mlp", "deep", "cnn", "gpt")
    optimizer: str = "adamw"
    at: int = BEGIN
    steps: int = 500
    level: str = "alert"
    policy: dict[str, Any] = field(default_factory=dict)
    twin: Hook | None = None
    """The same at a strength that is healthy; nobody may raise an alert."""

    twin_prepare: Callable[[Task], Any] | None = None


def scaled(loop: Loop, step: int, *, by: float) -> None:
    loop.factor = by


def faster(loop: Loop, step: int, *, by: float) -> None:
    loop.rate = by


def once(loop: Loop, step: int, *, by: float) -> None:
    loop.factor = by if step == BEGIN else 1.0


def shuffled(loop: Loop, step: int) -> None:
    """Targets of other rows."""

    def batch(given: Any) -> Any:
        inputs, target = given
        return inputs, target.flatten()[torch.randperm(target.numel())].reshape(target.shape)

    loop.batch = batch


def bad_input(loop: Loop, step: int) -> None:
    def batch(given: Any) -> Any:
        inputs, target = given
        return (inputs * math.nan if inputs.is_floating_point() else inputs), target

    loop.batch = batch


def nan_gradient(loop: Loop, step: int) -> None:
    def touched() -> None:
        weight = inner_linear(loop.task.model).weight
        if weight.grad is not None:
            weight.grad[0, 0] = math.nan

    loop.touched = touched if step == BEGIN else (lambda: None)


def rest_of(loop: Loop, step: int, *, factor: float) -> None:
    """The gradient of one layer is multiplied on its way back."""
    if step != BEGIN:
        return
    layer = inner_linear(loop.task.model)
    layer.register_forward_hook(lambda *a: _Scaled.apply(a[2], factor))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


def killed(loop: Loop, step: int) -> None:
    """A ReLU layer whose units never fire again."""
    if step == BEGIN:
        with torch.no_grad():
            inner_linear(loop.task.model).bias.fill_(-1e3)


def rewritten(loop: Loop, step: int) -> None:
    """Weights decay by more than half in each step, and the update takes their place."""
    loop.rate = 300.0
    for group in loop.optimizer.param_groups:
        group["weight_decay"] = 1.0


def clipped_by_the_loop(loop: Loop, step: int) -> None:
    parameters = list(loop.task.model.parameters())
    loop.touched = lambda: nn.utils.clip_grad_norm_(parameters, 0.1)


def same_again(loop: Loop, step: int) -> None:
    loop.rate = 0.0
    kept = loop.batch(loop.task.batch())
    if step == BEGIN:
        loop.batch = lambda given: kept


def half(task: Task) -> None:
    task.model.to(torch.bfloat16)
    inner, loss = task.batch, task.loss

    def batch() -> Any:
        inputs, target = inner()
        return (inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs), target

    task.batch, task.loss = batch, loss


def slow_half(loop: Loop, step: int, *, by: float) -> None:
    loop.rate = by


def scaler_of(scale: float, **kwargs: Any) -> Callable[[Task], Any]:
    return lambda task: torch.amp.GradScaler("cpu", init_scale=scale, **kwargs)


def in_float16(loop: Loop, step: int, *, by: float = 1.0) -> None:
    loop.autocast = functools.partial(torch.autocast, "cpu", dtype=torch.float16)
    loop.factor = by if step >= BEGIN else 1.0


def overflowing(loop: Loop, step: int) -> None:
    """A layer of which every gradient leaves its range, whatever the scale."""

    def touched() -> None:
        weight = inner_linear(loop.task.model).weight
        if weight.grad is not None:
            weight.grad[0, 0] = math.inf

    loop.touched = touched


def idle(task: Task) -> None:
    """A layer that is trained and that nobody calls."""
    inner_linear(task.model).register_module("idle", nn.Linear(4, 4))


def partial(function: Callable[..., None], **fixed: Any) -> Hook:
    return functools.partial(function, **fixed)


FAULTS: dict[str, Fault] = {
    "learning rate x100": Fault(
        kinds=("exploding", "oversized_update", "loss_spike", "collapsed"),
        hook=partial(faster, by=100), twin=partial(faster, by=2), optimizer="sgd",
    ),
    "learning rate x1000": Fault(
        kinds=("exploding", "oversized_update", "loss_spike", "nonfinite"),
        hook=partial(faster, by=1000), twin=partial(faster, by=0.1), optimizer="adamw",
    ),
    "loss x1000": Fault(
        kinds=("exploding",), hook=partial(scaled, by=1e3), twin=partial(scaled, by=1.5)
    ),
    "loss x1e-6": Fault(
        kinds=("collapsed",), hook=partial(scaled, by=1e-6), twin=partial(scaled, by=0.5)
    ),
    "one step x100": Fault(
        kinds=("spike",), hook=partial(once, by=100), level="event", twin=partial(once, by=2)
    ),
    "one NaN in a gradient": Fault(kinds=("nonfinite",), hook=nan_gradient),
    "NaN inputs": Fault(kinds=("nonfinite",), hook=bad_input, models=("mlp", "deep", "cnn")),
    "labels shuffled": Fault(kinds=("loss_spike",), hook=shuffled, models=("mlp", "deep", "cnn")),
    "labels shuffled, slowly seen": Fault(
        kinds=("diverging",), hook=shuffled, level="warning", models=("mlp", "deep", "cnn")
    ),
    "a layer loses its gradient": Fault(
        kinds=("vanishing", "collapsed"), hook=partial(rest_of, factor=1e-9),
        twin=partial(rest_of, factor=0.3), models=("mlp", "deep", "gpt"),
    ),
    "20 layers of sigmoids": Fault(
        kinds=("vanishing",), models=("sigmoid20",), optimizer="sgd", at=0
    ),
    "20 layers of sigmoids, stalled": Fault(
        kinds=("stalled_update",), models=("sigmoid20",), optimizer="sgd", at=0, steps=700
    ),
    "dead units": Fault(kinds=("dead",), hook=killed, models=("mlp",)),
    "updates of the size of the weights": Fault(
        kinds=("oversized_update",), hook=rewritten, models=("mlp", "tanh", "cnn"),
        twin=partial(faster, by=1.5),
    ),
    "every step overflows": Fault(
        kinds=("loss_scale_collapse",), hook=overflowing, prepare=scaler_of(2.0**16),
        models=("mlp", "cnn"), optimizer="fused", twin=lambda loop, step: None,
        twin_prepare=scaler_of(2.0**16),
    ),
    "float16 at a scale of 1": Fault(
        kinds=("underflow",), hook=partial(in_float16, by=1e-6), at=0,
        prepare=scaler_of(1.0, growth_interval=10**6), models=("mlp",), level="warning",
        twin=partial(in_float16, by=1.0), twin_prepare=scaler_of(2.0**16), steps=700,
    ),
    "bfloat16 weights at a rate of 2e-6": Fault(
        kinds=("swallowed_update",), prepare=half, hook=partial(slow_half, by=1e-3), at=0,
        models=("mlp", "tanh"), level="warning", twin=partial(slow_half, by=1e-3),
        twin_prepare=lambda task: None,
    ),
    "a layer that nobody calls": Fault(
        kinds=("unused",), prepare=idle, at=0, models=("mlp", "gpt"), level="warning"
    ),
    "the same batch again, at rest": Fault(
        kinds=("stuck",), hook=same_again, level="warning", models=("mlp", "deep")
    ),
    "clip_grad_norm_ left in the loop": Fault(
        kinds=("clipped_elsewhere",), hook=clipped_by_the_loop, at=0, level="warning",
        policy={"clip": [{"limit": 1.0}]},
    ),
    "a limit of 1e-3": Fault(
        kinds=("clip_saturated",), at=0, level="event", models=("mlp", "gpt"),
        policy={"clip": [{"limit": 1e-3}]},
    ),
}  # fmt: skip
