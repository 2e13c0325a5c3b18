"""Parameters in, their gradients out; scaling and dropping them.

The only file that touches `.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradwatch.records import Bools, Float32s

__all__ = ["Gradients", "drop", "gather", "scale"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of one step: Q of the P watched parameters have one."""

    values: list[torch.Tensor]
    """[Q] in parameter order. Of a sparse gradient its coalesced values: scaling them scales it."""

    present: bytes
    """[P] 1 where the parameter has a gradient; hashable, so that plans can be kept by it."""

    @property
    def present_P(self) -> Bools:
        return np.frombuffer(self.present, dtype=np.bool_)


def gather(parameters: Sequence[torch.nn.Parameter]) -> Gradients:
    """Collects `.grad`. A sparse one is coalesced in place, so that it is paid for once."""
    grads = [parameter.grad for parameter in parameters]
    values = [grad for grad in grads if grad is not None]
    present = bytes([grad is not None for grad in grads])
    for i, value in enumerate(values):
        if value.layout != torch.strided:
            values[i] = _coalesced(parameters, value)
    return Gradients(values, present)


def _coalesced(parameters: Sequence[torch.nn.Parameter], grad: torch.Tensor) -> torch.Tensor:
    owner = next(parameter for parameter in parameters if parameter.grad is grad)
    owner.grad = grad.coalesce()
    return owner.grad._values()


def scale(gradients: Gradients, coefs_Q: torch.Tensor, on_host_Q: Float32s) -> None:
    """grad *= coef in place, where the coef is below 1."""
    values = gradients.values
    all_alike = on_host_Q.min() == on_host_Q.max()
    for device in {value.device for value in values}:
        coefs = coefs_Q.to(device)
        chosen = [
            i for i, value in enumerate(values) if value.device == device and on_host_Q[i] < 1.0
        ]
        if all_alike:
            torch._foreach_mul_([values[i] for i in chosen], coefs[0])
        elif chosen:
            # 0-d tensors, not floats: a list of floats takes four times as long.
            factors = coefs.unbind()
            torch._foreach_mul_([values[i] for i in chosen], [factors[i] for i in chosen])


def drop(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Makes the step a step without gradients: parameters and optimizer state stay as they are."""
    # None, not zeros: a zero gradient still decays weights and moves momentum.
    for parameter in parameters:
        parameter.grad = None
