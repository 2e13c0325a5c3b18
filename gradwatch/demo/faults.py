"""The faults: each breaks one thing of a running task, as it happens to real ones, and mends it.

A fault is a context manager: entered before its first step, left after its last. It changes
nothing but the task; what becomes of that is for gradwatch to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from gradwatch.demo.task import Task

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is broken, for how long, and what gradwatch ought to call it."""

    sentence: str
    """What was done, after `at step 360: `."""

    duration: int | None
    """In steps; None lasts to the end."""

    kind: str
    """The anomaly that shows it."""

    breaking: Callable[[Task], AbstractContextManager[None]]


@contextmanager
def _faster(task: Task) -> Iterator[None]:
    groups = task.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= 100
    yield
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _nan(task: Task) -> Iterator[None]:
    def poison(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        poisoned = inputs[0].clone()
        poisoned.view(-1)[0] = torch.nan
        return (poisoned,)

    with task.entry.register_forward_pre_hook(poison):
        yield


@contextmanager
def _louder(task: Task) -> Iterator[None]:
    with task.criterion.register_forward_hook(lambda module, inputs, loss: 1000 * loss):
        yield


@contextmanager
def _silent(task: Task) -> Iterator[None]:
    with task.victim.register_forward_hook(lambda module, inputs, output: 0 * output):
        yield


FAULTS = {
    "lr": Fault(
        sentence="the learning rate was multiplied by 100 for 4 steps",
        duration=4,
        kind="exploding",
        breaking=_faster,
    ),
    "nan": Fault(
        sentence="one batch held one NaN",
        duration=1,
        kind="nonfinite",
        breaking=_nan,
    ),
    "loss": Fault(
        sentence="the loss was multiplied by 1000 for 10 steps",
        duration=10,
        kind="exploding",
        breaking=_louder,
    ),
    "dead": Fault(
        sentence="the output of one layer was zeroed from then on",
        duration=None,
        kind="vanishing",
        breaking=_silent,
    ),
}
"""By the name that the command line knows; `none` is the healthy twin and has no entry."""
