"""A run under gradwatch with its default detectors: healthy, or with one fault.

A fault begins at a step and is one of three hooks into the loop: on the model, on the loss, or on
what happens between backward and step. A twin is the healthy run nearest to it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import gradwatch
from benchmarks.detectors.tasks import Task, task

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True),
}
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "cosine": lambda step, steps: (
        min(1.0, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    ),
    "decay": lambda step, steps: 0.1 ** (3 * step // steps),
}
Hook = Callable[["Loop", int], None]


@dataclass
class Setting:
    """What is trained, and how."""

    model: str
    optimizer: str = "adamw"
    schedule: str = "constant"
    clip: bool = False
    accumulate: int = 1
    seed: int = 0
    steps: int = 500

    def __str__(self) -> str:
        extras = "".join([" clipped" * self.clip, " accumulated" * (self.accumulate > 1)])
        return f"{self.model} {self.optimizer} {self.schedule}{extras}"


@dataclass
class Loop:
    """A training loop that faults may reach into."""

    setting: Setting
    task: Task
    optimizer: torch.optim.Optimizer
    watch: gradwatch.Watch
    scaler: Any = None
    factor: float = 1.0
    rate: float = 1.0
    loss: float = math.nan
    batch: Callable[[Any], Any] = field(default=lambda batch: batch)
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    touched: Callable[[], None] = field(default=lambda: None)
    """Called between backward and step."""

    def step(self, number: int) -> None:
        base = self.optimizer.defaults["lr"]
        rate = SCHEDULES[self.setting.schedule](number, self.setting.steps) * base * self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        for micro in self.watch.micro_batches(
            [self.batch(self.task.batch()) for _ in range(self.setting.accumulate)]
        ):
            with micro:
                with self.autocast():
                    loss = self.task.loss(micro.batch)
                self.loss = float(loss.detach())
                self.watch.log(loss=self.loss)
                scaled = micro.scale(loss * self.factor)
                scaled = scaled if self.scaler is None else self.scaler.scale(scaled)
                scaled.backward()
            if micro.last:
                self.touched()
                self._update()

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def untouched(task: Task) -> None:
    """Nothing is changed before the run."""


def played(
    setting: Setting,
    fault: Hook | None = None,
    at: int = 0,
    *,
    prepare: Callable[[Task], Any] = untouched,
    policy: dict[str, Any] | None = None,
) -> list[gradwatch.Anomaly]:
    """The anomalies of one run.

    Args:
        fault: called with the loop at every step from `at` on.
        prepare: changes the task before it is watched; may return a loss scaler.
    """
    made = task(setting.model, setting.seed)
    scaler = prepare(made)
    optimizer = OPTIMIZERS[setting.optimizer](made.model.parameters())
    sections: dict[str, Any] = {"version": 1, "guard": {"nonfinite": "skip"}}
    if setting.clip:
        sections["clip"] = [{"limit": 1.0}]
    if setting.accumulate > 1:
        sections["accumulate"] = {"steps": setting.accumulate}
    sections |= policy or {}
    found: list[gradwatch.Anomaly] = []
    losses: list[float] = []
    with gradwatch.attach(
        made.model, optimizer, sections, port=None, recording=None, scaler=scaler
    ) as watch:
        watch.on_anomaly(found.append)
        loop = Loop(setting, made, optimizer, watch, scaler)
        for number in range(setting.steps):
            if fault is not None and number >= at:
                fault(loop, number)
            loop.step(number)
            losses.append(loop.loss)
            if number % 100 == 99:
                watch.flush()
    if fault is None and prepare is untouched and not learns(losses):
        raise ValueError(f"{setting} seed {setting.seed} does not learn: it is no healthy run")
    return found


def learns(losses: list[float]) -> bool:
    """Whether the last tenth of the losses is well below the first few."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[-tenth:]) / tenth < 0.8 * sum(losses[:5]) / 5


def healthy_settings(seed: int) -> Iterator[Setting]:
    """36 settings: every model with every optimizer and schedule at least once."""
    models = ("mlp", "cancer", "deep", "tanh", "cnn", "gpt", "lstm")
    number = 0
    for model in models:
        for optimizer in ("sgd", "adam", "adamw"):
            schedule = list(SCHEDULES)[number % 3]
            clip, accumulate = number % 2 == 1, 4 if number % 5 == 4 else 1
            yield Setting(model, optimizer, schedule, clip, accumulate, seed + number)
            number += 1
    for model in ("mlp", "deep", "cnn", "gpt", "lstm"):
        for schedule in SCHEDULES:
            yield Setting(model, "adamw", schedule, number % 2 == 0, 1, seed + number)
            number += 1


def inner_linear(model: nn.Module) -> nn.Linear:
    """A linear layer from the middle of a model."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    return linears[len(linears) // 2]
