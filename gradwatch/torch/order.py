"""In which order a backward pass comes to the parameters: seen once, in the first one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["BackwardOrder"]


class _Removable(Protocol):
    def remove(self) -> None: ...


class BackwardOrder:
    """Hooks on all parameters until the first step is due, then none."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.places: tuple[int, ...] = ()
        """Indices of parameters, the one nearest to the loss first; those that had no gradient in
        the first pass are not among them. Empty until it has been."""

        self._seen: dict[int, None] = {}
        self._complete = False
        self._handles: list[_Removable] = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._fired, place))  # type: ignore[no-untyped-call]
            for place, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def _fired(self, place: int, _: torch.Tensor) -> None:
        # What fires again is of the next pass.
        self._complete = self._complete or place in self._seen
        if not self._complete:
            self._seen[place] = None

    def take(self) -> tuple[int, ...]:
        """The order, once a step is due; the hooks are gone from then on."""
        if self._handles and self._seen:
            self.places = tuple(self._seen)
            self.remove()
        return self.places

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
