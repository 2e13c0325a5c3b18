"""Parameters in, their gradients out; scaling, clamping and dropping them.

The only file that touches `.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradwatch.torch.shares import local

__all__ = ["Gradients", "clamp", "drop", "gather", "scale", "zero_above"]

STRIDED = {torch.strided}


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of one step: Q of the P watched parameters have one."""

    values: list[torch.Tensor]
    """[Q] in parameter order. Of a sparse gradient its coalesced values: scaling them scales it."""

    coalesced: list[tuple[torch.nn.Parameter, torch.Tensor]]
    """Sparse gradients whose values are those of a copy, to be put in place if they are changed."""

    rows: dict[int, torch.Tensor]
    """By position the rows that the values of a sparse gradient are of."""

    present: bytes
    """[P] 1 where the parameter has a gradient; hashable, so that plans can be kept by it."""

    factor: float = 1.0
    """What the optimizer is due to see is so many times the gradient."""

    loss_scale: torch.Tensor | None = None
    """0-d: what the gradients are still multiplied by, and the optimizer will divide by."""

    found_inf: torch.Tensor | None = None
    """0-d: not 0 where a loss scaler has the optimizer drop the step."""

    everywhere: bytes | None = None
    """[P] of the parameters of all processes: those that the decision is over. None where this
    process has all of them."""

    @property
    def decided(self) -> bytes:
        return self.present if self.everywhere is None else self.everywhere

    @property
    def unit(self) -> float | torch.Tensor:
        """What a value is multiplied by for what the optimizer is due to see."""
        return self.factor if self.loss_scale is None else self.factor / self.loss_scale

    def about_to_change(self) -> None:
        """Puts coalesced gradients in place. Before that training is what it was: an optimizer
        sums repeated rows in an order of its own."""
        for parameter, grad in self.coalesced:
            parameter.grad = grad


def gather(
    parameters: Sequence[torch.nn.Parameter],
    factor: float = 1.0,
    loss_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> Gradients:
    """Collects `.grad`."""
    grads = [None if p.grad is None else local(p.grad) for p in parameters]
    present = bytes([grad is not None for grad in grads])
    values = [grad for grad in grads if grad is not None]
    coalesced, rows = [], {}
    if not {value.layout for value in values} <= STRIDED:
        owners = [p for p, grad in zip(parameters, grads, strict=True) if grad is not None]
        for i, (owner, value) in enumerate(zip(owners, values, strict=True)):
            if value.layout != torch.strided:
                whole = value.coalesce()
                coalesced.append((owner, whole))
                values[i] = whole._values()
                rows[i] = whole._indices()[0]
    return Gradients(values, coalesced, rows, present, factor, loss_scale, found_inf)


def scale(
    values: Sequence[torch.Tensor], coefs_Q: torch.Tensor, host: Sequence[float] | None
) -> None:
    """value *= coef in place; with the coefs on the host only where they are not 1."""
    changed = range(len(values)) if host is None else [i for i, c in enumerate(host) if c != 1.0]
    zeroed = [] if host is None else [values[i] for i in changed if host[i] == 0.0]
    all_alike = host is not None and len(set(host)) == 1
    for device in {value.device for value in values}:
        chosen = [
            i for i in changed if values[i].device == device and (host is None or host[i] != 0.0)
        ]
        if not chosen:
            continue
        coefs = coefs_Q.to(device)
        members = [_writable(values[i]) for i in chosen]
        if all_alike:
            torch._foreach_mul_(members, coefs[0])
        else:
            # 0-d tensors, not floats: a list of floats takes four times as long.
            factors = coefs.unbind()
            torch._foreach_mul_(members, [factors[i] for i in chosen])
    if zeroed:
        torch._foreach_zero_(zeroed)  # 0 times NaN would be NaN


def _writable(value: torch.Tensor) -> torch.Tensor:
    """The same memory without a conjugation or negation that is only noted down: a real factor is
    the same for both, and foreach kernels refuse them."""
    if value.is_conj():
        value = value.conj()
    return torch._neg_view(value) if value.is_neg() else value


def clamp(values: Sequence[torch.Tensor], bounds: Sequence[torch.Tensor]) -> None:
    """Brings every element into [-bound, bound], in place; NaN stays NaN.

    Complex elements keep their phase.
    """
    for value, bound in zip(values, bounds, strict=True):
        if value.is_complex():
            value.mul_(torch.clamp(bound / value.abs(), max=1.0).nan_to_num_(nan=1.0))
        else:
            limit = bound.to(value.device, value.dtype)
            torch.clamp(value, -limit, limit, out=value)


def zero_above(values: Sequence[torch.Tensor], bounds: Sequence[torch.Tensor]) -> None:
    """Makes every element beyond its bound 0, in place, and every NaN."""
    for value, bound in zip(values, bounds, strict=True):
        value.masked_fill_(~(value.abs() <= bound.to(value.device)), 0.0)


def drop(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Makes the step a step without gradients: parameters and optimizer state stay as they are."""
    # None, not zeros: a zero gradient still decays weights and moves momentum.
    for parameter in parameters:
        parameter.grad = None
