"""A plain training loop with gradwatch beside it, and a fault in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

from gradwatch.demo.faults import Fault
from gradwatch.demo.task import Task
from gradwatch.watch import Watch

__all__ = ["paced", "train"]


def train(
    task: Task, watch: Watch, steps: int, fault: Fault | None, fault_step: int
) -> Iterator[int]:
    """Takes `steps` steps and yields the number of each; from `fault_step` on the fault is in."""
    with ExitStack() as broken:
        for step in range(steps):
            if fault and step == fault_step:
                broken.enter_context(fault.breaking(task))
            if fault and fault.duration and step == fault_step + fault.duration:
                broken.close()
            inputs, targets = next(task.batches)
            task.optimizer.zero_grad()
            loss = task.criterion(task.model(inputs), targets)
            loss.backward()
            watch.log(loss=loss)
            task.optimizer.step()
            yield step


def paced(steps: Iterator[int], seconds: float) -> Iterator[int]:
    """The same steps, none sooner than `seconds` after the one before."""
    due = time.monotonic() + seconds
    for step in steps:
        time.sleep(max(due - time.monotonic(), 0.0))
        due = max(due, time.monotonic()) + seconds
        yield step
