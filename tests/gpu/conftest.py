"""What runs on a CUDA device: models there, and watches that are closed when the test ends."""

from __future__ import annotations

import pytest
import torch


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
