"""Gradients of micro-batches kept aside, so that an unchanged loop accumulates.

Each `step()` of the loop but the last of a window finds no gradients and does nothing; at the last
one their sum is put back. Gradients in half precision are added up in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Stash"]


HALF = (torch.float16, torch.bfloat16)


class Stash:
    """One sum for each parameter that had a gradient; one more copy of the gradients in memory."""

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], *, only_half: bool = False
    ) -> None:
        """
        Args:
            only_half: leave alone what is not in half precision.
        """
        self._parameters = list(parameters)
        self._only_half = only_half
        self._sums: dict[int, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def extend(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """More parameters behind the ones of before."""
        self._parameters = list(parameters)

    def take(self, loss_scale: torch.Tensor | None) -> None:
        """Adds the gradients that are due and takes them away from the optimizer.

        Args:
            loss_scale: what they are still multiplied by, 0-d. It may change before the next ones,
                so the sums are without it.
        """
        new, sums, addends = {}, [], []
        for i, parameter in enumerate(self._parameters):
            grad = parameter.grad
            if grad is None or (self._only_half and grad.dtype not in HALF):
                continue
            parameter.grad = None
            grad = grad.float() if grad.dtype in HALF else grad
            if i not in self._sums:
                new[i] = _own(grad)
            elif grad.layout != torch.strided or self._sums[i].layout != torch.strided:
                self._sums[i] = self._sums[i] + _unscaled([grad], loss_scale)[0]
            else:
                sums.append(self._sums[i])
                addends.append(grad)
        if addends:
            torch._foreach_add_(sums, _unscaled(addends, loss_scale))
        self._sums |= zip(new, _unscaled(list(new.values()), loss_scale), strict=True)

    def give_back(self, loss_scale: torch.Tensor | None) -> None:
        """Makes the sums the gradients that are due, multiplied by the loss scale again."""
        sums, self._sums = self._sums, {}
        if loss_scale is not None and sums:
            strided = [s for s in sums.values() if s.layout == torch.strided]
            torch._foreach_mul_(strided, loss_scale)
        for i, total in sums.items():
            self._parameters[i].grad = total.to(self._parameters[i].dtype)

    def clear(self) -> None:
        self._sums = {}


def _own(grad: torch.Tensor) -> torch.Tensor:
    """The gradient itself, but a copy of a view: DistributedDataParallel goes on writing to the
    buckets that its gradients are views of."""
    return grad.clone() if grad._is_view() else grad


def _unscaled(grads: list[torch.Tensor], loss_scale: torch.Tensor | None) -> list[torch.Tensor]:
    """The gradients without the loss scale, in place."""
    if loss_scale is not None and grads:
        torch._foreach_mul_(grads, 1.0 / loss_scale)
    return grads
