"""The state of every generator that a forward pass may draw from, to be put back for a moment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState"]


@dataclass(frozen=True, slots=True)
class RandomState:
    python: Any
    numpy: Any
    host: torch.Tensor
    device: torch.Tensor | None
    """Of the accelerator that the parameters are on."""

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        on_device = None
        if device.type not in ("cpu", "meta"):
            on_device = torch.get_device_module(device).get_rng_state(device)
        return cls(
            random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), on_device
        )

    def put(self, device: torch.device) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)

    @contextmanager
    def in_force(self, device: torch.device) -> Iterator[None]:
        """This state within the block, and the present one behind it."""
        present = RandomState.now(device)
        self.put(device)
        try:
            yield
        finally:
            present.put(device)
