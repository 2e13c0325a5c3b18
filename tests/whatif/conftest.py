"""Recordings of small real runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gradwatch

STEPS = 160


class Recorded:
    """One run of a small model under a policy, and its recording."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self,
        policy: dict | None,
        *,
        steps: int = STEPS,
        gains: Callable[[int], float] = lambda step: 1.0,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        before: Callable[..., None] = lambda watch: None,
    ) -> gradwatch.Recording:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Embedding(11, 8), torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
        )
        made = optimizer(model.parameters(), lr=1e-3)
        draw = torch.Generator().manual_seed(1)
        with gradwatch.attach(
            model, made, policy, run="small", port=None, recording=self._folder
        ) as watch:
            before(watch)
            for step in range(steps):
                tokens = torch.randint(0, 11, (8,), generator=draw)
                loss = model(tokens).square().mean() * gains(step)
                loss.backward()
                if step % 3 == 0 and step:
                    model[3].bias.grad = None  # not each parameter has a part in each step
                value = float(loss.detach())
                watch.log(loss=value if math.isfinite(value) else 1e9)
                made.step()
                made.zero_grad()
        assert watch.recording is not None
        return gradwatch.open_recording(watch.recording)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def rough(step: int) -> float:
    """Norms that vary, with spikes, one NaN and a new level."""
    gain = 1.0 + 0.3 * math.sin(step) + (2.0 if step > 120 else 0.0)
    return math.nan if step == 70 else gain * (100.0 if step in (60, 90) else 1.0)
