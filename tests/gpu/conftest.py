"""What runs on a CUDA device: models there, and watches that are closed when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import gradwatch


@pytest.fixture
def attach() -> Iterator[Callable[..., gradwatch.Watch]]:
    """`gradwatch.attach` that serves and records nothing unless asked."""
    watches = []

    def attach_quietly(*args, **kwargs) -> gradwatch.Watch:
        watch = gradwatch.attach(*args, **{"port": None, "recording": None, **kwargs})
        watches.append(watch)
        return watch

    yield attach_quietly
    for watch in watches:
        watch.close()


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 32)
    ).cuda()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(16, 64, generator=draw).cuda() for _ in range(8)]
