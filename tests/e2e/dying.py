"""Runs that explode and die 50 ms later, a forked process each.

    dying.py GO '[{"run": ..., "way": ..., "fault": ..., "attach": {...}}, ...]'

They train until the file GO is there, and then die one after another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gradwatch

WARMUP = 120
APART_SECONDS = 0.4
"""So that each has the machine for itself while it dies."""

STEP_SECONDS = 0.2


def train(place: int, go: Path, spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = gradwatch.attach(model, optimizer, run=spec["run"], **spec["attach"])

    def step(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        loss = factor * model(torch.randn(8, 16)).square().mean()
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()

    for _ in range(WARMUP):
        step()
    parent = os.getppid()
    while not go.exists():
        time.sleep(STEP_SECONDS)
        step()
        if os.getppid() != parent:
            os._exit(1)  # the test is gone
    for _ in range(round((1 + place) * APART_SECONDS / STEP_SECONDS)):
        time.sleep(STEP_SECONDS)
        step()
    if spec["fault"] == "nonfinite":
        step(float("nan"))
    elif spec["fault"] == "exploding":
        for _ in range(3):
            step(1e8)
    time.sleep(0.05)
    die(spec["way"])


def die(way: str) -> None:
    match way:
        case "exception":
            raise RuntimeError("the loss is gone")
        case "sys.exit":
            sys.exit(3)
        case "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "os._exit":
            os._exit(7)


def load() -> None:
    """Everything that a watched step imports, once for all; without a backward pass, whose threads
    no fork survives."""
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, port=None, recording=None):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    load()
    go = Path(sys.argv[1])
    children = {}
    for place, spec in enumerate(json.loads(sys.argv[2])):
        child = os.fork()
        if child == 0:
            train(place, go, spec)
            return
        children[child] = spec["run"]
    while children:
        child, status = os.wait()
        print("ended", children.pop(child), os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
