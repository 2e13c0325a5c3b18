"""Small real models, and watches that are closed when the test ends."""

from __future__ import annotations

import copy

import pytest
import torch


class Net(torch.nn.Module):
    """Embedding, convolution, normalisation and a head: every kind of small tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 16)
        self.conv = torch.nn.Conv1d(16, 16, 3, padding=1)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x).mean(dim=1))


class Task:
    """One model with its data: `gradient(step)` fills the gradients of that step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def gradient(self, step: int, gain: float = 1.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 20, (8, 6), generator=generator)
        target = torch.randint(0, 5, (8,), generator=generator)
        loss = torch.nn.functional.cross_entropy(self.model(tokens), target) * gain
        self.model.zero_grad()
        loss.backward()
        return loss

    def copy(self) -> Task:
        return Task(copy.deepcopy(self.model))

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    return Task(Net())
