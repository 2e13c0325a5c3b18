"""What runs on a CUDA device only, and says so where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import gradwatch


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here: nothing of tests/gpu was tried")


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
