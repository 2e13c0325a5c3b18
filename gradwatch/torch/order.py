"""In which order a backward pass comes to the parameters: seen in the first, then now and then."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["BackwardOrder"]


class BackwardOrder:
    """Hooks on all parameters, in the first steps and then ever more rarely: 1, 2, 3, 5, 9, ..."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._places: tuple[int, ...] = ()
        self._times_seen = 0
        self._varies = False
        self._seen: dict[int, None] = {}
        self._complete = False
        self._steps = 0
        self._handles: list[RemovableHandle] = []
        self._look()

    @property
    def places(self) -> tuple[int, ...]:
        """Indices of parameters, the one nearest to the loss first; those that had no gradient in
        the passes that were seen are not among them. Empty before there was one, and where they
        differ from each other."""
        return () if self._varies else self._places

    @property
    def is_sure(self) -> bool:
        """Whether it was seen again, of the same parameters, and was the same."""
        return self._times_seen > 1 and not self._varies

    def take(self) -> None:
        """A step is due."""
        if self._handles and self._seen:
            self._compare(tuple(self._seen))
            self.remove()
        self._steps += 1
        if self._steps.bit_count() == 1:
            self._look()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen, self._complete = {}, False

    def _look(self) -> None:
        if not self._handles and not self._varies:
            self._handles = [
                parameter.register_post_accumulate_grad_hook(functools.partial(self._fired, place))  # type: ignore[no-untyped-call]
                for place, parameter in enumerate(self._parameters)
                if parameter.requires_grad
            ]

    def _fired(self, place: int, _: torch.Tensor) -> None:
        # What fires again is of the next pass.
        self._complete = self._complete or place in self._seen
        if not self._complete:
            self._seen[place] = None

    def _compare(self, seen: tuple[int, ...]) -> None:
        before, now = set(self._places), set(seen)
        self._times_seen = self._times_seen + 1 if before == now else 1
        if [i for i in self._places if i in now] != [i for i in seen if i in before]:
            self._varies = True
        elif len(seen) > len(self._places):
            self._places = seen
