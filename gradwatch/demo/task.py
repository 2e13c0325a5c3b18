"""What is trained: a model, its optimizer and its batches, and where faults can get at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that a plain training loop needs."""

    name: str
    title: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    criterion: torch.nn.Module
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
    """Inputs and targets, without end."""

    entry: torch.nn.Module
    """The first module that is given floats: where a NaN can come in."""

    victim: torch.nn.Module
    """A module in the middle, which a fault can silence."""
