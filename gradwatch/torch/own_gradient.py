"""The gradient as a backward pass leaves it: before it is averaged with those of other processes,
and before a loop does anything to it.

    hooks in backward, where a gradient has just been added up  ->  take(): is it bad, and its norm

Only there does it exist. One small parameter at the end of the backward pass is looked at in every
step, since NaN reaches it from wherever it began; all parameters in sampled steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gradwatch.torch.measure import tensor_norms

__all__ = ["Own", "OwnGradient"]

LARGEST_LOOKED_AT = 2**16
"""Elements of the parameter that is looked at in every step, where there is such a small one."""


@dataclass(frozen=True, slots=True)
class Own:
    """Of one step, on the device."""

    is_bad: torch.Tensor | None = None
    """0-d, whether it holds NaN or inf; None where no backward pass came by."""

    norm: torch.Tensor | None = None
    """0-d, its L2 norm as the loss was scaled; None where the step was not sampled."""


class OwnGradient:
    """Over a fixed list of parameters whose gradients are averaged by hooks of their own."""

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], on_error: Callable[[str], None]
    ) -> None:
        self._parameters = list(parameters)
        self._on_error = on_error
        self._is_broken = False
        self._norms: dict[int, torch.Tensor] = {}
        self._is_bad: torch.Tensor | None = None
        self._sampling: list[RemovableHandle] = []
        self._looked_at: int | None = None
        self._looking: list[RemovableHandle] = []
        self._order: Sequence[int] = ()
        self._look_at(_last_small(self._parameters, self._order))

    def sample(self) -> None:
        """The next step is sampled."""
        if not (self._sampling or self._is_broken):
            self._sampling = [
                parameter.register_post_accumulate_grad_hook(functools.partial(self._measured, i))  # type: ignore[no-untyped-call]
                for i, parameter in enumerate(self._parameters)
                if parameter.requires_grad
            ]

    def take(self, order: Sequence[int]) -> Own:
        """Of the step that is due.

        Args:
            order: places of parameters in the order of a backward pass, if it is known.
        """
        norm = None
        if self._sampling and self._norms:
            norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
            _take_off(self._sampling)
        own = Own(self._is_bad, norm)
        self._norms, self._is_bad = {}, None
        if order is not self._order and not self._is_broken:
            self._order = order
            self._look_at(_last_small(self._parameters, order))
        return own

    def remove(self) -> None:
        _take_off(self._sampling)
        _take_off(self._looking)
        self._looked_at = None

    def _look_at(self, place: int | None) -> None:
        if place == self._looked_at:
            return
        _take_off(self._looking)
        self._looked_at = place
        if place is not None:
            hook = self._parameters[place].register_post_accumulate_grad_hook(self._looked)  # type: ignore[no-untyped-call]
            self._looking.append(hook)

    def _looked(self, parameter: torch.Tensor) -> None:
        try:
            is_bad = ~torch.isfinite(_values(parameter)).all()
            self._is_bad = is_bad if self._is_bad is None else self._is_bad | is_bad
        except Exception:
            self._failed()

    def _measured(self, place: int, parameter: torch.Tensor) -> None:
        try:
            (norm,) = tensor_norms([_values(parameter)])
            self._norms[place] = norm.to(self._parameters[0].device, torch.float64)
        except Exception:
            self._failed()

    def _failed(self) -> None:
        """In the middle of a backward pass, which goes on; nothing is looked at any more."""
        self._on_error("measure")
        self._is_broken = True
        self.remove()


def _values(parameter: torch.Tensor) -> Any:
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    if gradient.layout == torch.sparse_coo:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _last_small(parameters: Sequence[torch.nn.Parameter], order: Sequence[int]) -> int | None:
    """A small parameter late in the backward pass; where the order is not known, early in the
    model."""
    places = [*reversed(order)] or [i for i, p in enumerate(parameters) if p.requires_grad]
    small = (i for i in places if parameters[i].numel() <= LARGEST_LOOKED_AT)
    return next(small, min(places, key=lambda i: parameters[i].numel(), default=None))


def _take_off(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
