"""An unchanged loop that calls `step()` for each micro-batch: which of those calls is a step?

gradients of a micro-batch -> Stash -> ... -> their sum is due
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from gradwatch.accumulation import Window
from gradwatch.errors import PolicyError
from gradwatch.saying import say
from gradwatch.torch.gradients import drop
from gradwatch.torch.stash import Stash

__all__ = ["UnchangedLoop"]


class UnchangedLoop:
    """`drive: hook` of a loop that does not call `watch.micro_batches`."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], window: Window) -> None:
        self._parameters = list(parameters)
        self._window = window
        self._stash = Stash(parameters)
        self._ending = False
        self._has_stepped = False

    def extend(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """More parameters behind the ones of before."""
        self._parameters = list(parameters)
        self._stash.extend(parameters)

    def is_due(
        self, passes: int, loss_scale: torch.Tensor | None, found_inf: torch.Tensor | None
    ) -> bool:
        """Whether the call ends a window, whose sum is in `.grad` then; else nothing is.

        Args:
            passes: backward passes since the last call.
            loss_scale: what the gradients are still multiplied by, 0-d.
            found_inf: not 0 where the micro-batch overflowed; it is left out of the window.

        Raises:
            PolicyError: the loop accumulates by itself.
        """
        if passes > 1:
            self._accumulates_by_itself(passes)
        if found_inf is not None and bool(found_inf != 0):
            drop(self._parameters)
            return False
        if any(parameter.grad is not None for parameter in self._parameters):
            self._window.add()
        if not (self._ending or self._window.is_full):
            self._stash.take(loss_scale)
            return False
        if self._stash:
            self._stash.take(loss_scale)
            self._stash.give_back(loss_scale)
        self._ending = False
        self._has_stepped = True
        return True

    def end(self) -> bool:
        """Ends the window at the next call; whether that must be made, nothing else being due."""
        has_gradients = any(parameter.grad is not None for parameter in self._parameters)
        self._ending = has_gradients or bool(self._stash)
        return self._ending and not has_gradients

    def abandon(self) -> None:
        """Drops what belongs to a window that will not be finished."""
        if self._stash:
            say(
                logging.WARNING,
                "%d micro-batches of an unfinished window were dropped: call watch.end_window() "
                "behind the last one to step over them", self._window.count,
            )  # fmt: skip
        self._stash.clear()

    def _accumulates_by_itself(self, passes: int) -> None:
        said = (
            f"accumulate.drive is hook, which turns {self._window.num_steps} calls of step() into "
            f"one, and this loop ran {passes} backward passes before one. A loop that accumulates "
            "by itself needs drive: loop"
        )
        if not self._has_stepped:
            raise PolicyError(said)
        say(logging.WARNING, "%s. The passes count as one micro-batch", said)
