"""The norm of the gradient of a window's first micro-batch, for the gradient noise scale.

One more pass over the gradients, in one window out of `EVERY`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradwatch.torch.gradients import gather
from gradwatch.torch.measure import measure

__all__ = ["FirstMicroBatch"]

EVERY = 4


class FirstMicroBatch:
    """Measured behind its backward pass, taken at the step."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._windows = 0
        self._norm: torch.Tensor | None = None

    def extend(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """More parameters behind the ones of before."""
        self._parameters = list(parameters)

    @torch.no_grad()
    def measure(self, times: float | torch.Tensor) -> None:
        """Of the gradients that are there now, multiplied by what makes them its own."""
        self._norm = None
        self._windows += 1
        if (self._windows - 1) % EVERY:
            return
        values = gather(self._parameters).values
        if values:
            norms = measure(values, device=self._parameters[0].device)
            self._norm = torch.linalg.vector_norm(norms) * times

    def take(self) -> torch.Tensor | None:
        """0-d; None where it was not measured in this window."""
        norm, self._norm = self._norm, None
        return norm
