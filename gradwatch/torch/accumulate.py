"""Micro-batches on their way to a step.

An unchanged loop calls `step()` for each of them: which of those calls is a step? A loop that marks
them says so itself, and only sums in half precision are kept for it.

gradients of a micro-batch -> Stash -> ... -> their sum is due
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from gradwatch.accumulation import MicroBatch, Window
from gradwatch.errors import GradwatchError, PolicyError
from gradwatch.saying import say
from gradwatch.torch.gradients import drop
from gradwatch.torch.noise import FirstMicroBatch
from gradwatch.torch.reduction import Reduction
from gradwatch.torch.stash import HALF, Stash

__all__ = ["MarkedLoop", "UnchangedLoop"]


class MarkedLoop:
    """The micro-batches of `watch.micro_batches`."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        window: Window,
        first: FirstMicroBatch,
        reduction: Reduction,
    ) -> None:
        self._window = window
        self._first = first
        self._reduction = reduction
        self._parameters = list(parameters)
        self._sums = Stash(parameters, only_half=True)
        self._has_given_back = False
        window.agree = reduction.mean_weight if reduction.asks else None

    @property
    def holds_sums(self) -> bool:
        """Whether part of the window that is due is not in `.grad`."""
        return bool(self._sums) or (self._reduction.is_held and self._reduction.keeps_whole)

    def extend(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """More parameters behind the ones of before."""
        self._parameters = list(parameters)
        self._sums.extend(parameters)

    def begin(self, loader: object, partial: str) -> None:
        """
        Raises:
            GradwatchError: processes would take other numbers of steps.
        """
        if self._reduction.asks:
            self._reduction.refuse_other_windows(loader, self._window, partial)

    @torch.no_grad()
    def began(self, micro: MicroBatch[Any]) -> None:
        """Before the forward pass of a micro-batch."""
        self._has_given_back = False
        if not micro.syncs:
            self._reduction.hold()
        elif self._reduction.is_held and self._sums:
            self._has_given_back = True
            self._sums.give_back(None)  # of this process alone: to be reduced with the last ones

    @torch.no_grad()
    def ended(self, micro: MicroBatch[Any]) -> None:
        """Behind the backward pass of a micro-batch."""
        self._reduction.release()
        if micro.syncs and not micro.failed:
            self._reduction.is_held = False
        if micro.failed and self._has_given_back:
            self._sums.take(None)
            return
        if micro.failed:
            drop([p for p in self._parameters if p.grad is not None and p.grad.dtype in HALF])
            return
        if self._window.count == 1 and not micro.last and micro.divisor is not None:
            self._first.measure(micro.divisor)
        if not micro.last or self._sums:
            self._sums.take(None)
        if micro.last:
            self._sums.give_back(None)

    def clear(self) -> None:
        """
        Raises:
            GradwatchError: what is held back cannot be dropped.
        """
        if self._reduction.is_held and self._reduction.keeps_whole:
            raise GradwatchError(
                "the loop was left in the middle of a window under accumulate.sync: boundary, and "
                "fully_shard keeps its gradients where they cannot be dropped. End the window "
                "first, say partial: carry, or leave sync out"
            )
        self._reduction.is_held = False
        self._sums.clear()


class UnchangedLoop:
    """`drive: hook` of a loop that does not call `watch.micro_batches`."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        window: Window,
        first: FirstMicroBatch,
        reduction: Reduction,
    ) -> None:
        self._parameters = list(parameters)
        self._window = window
        self._reduction = reduction
        self._first = first
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
        if self._window.weighs:
            raise PolicyError(
                "accumulate.weigh: weight needs the weight of each loss, which an unchanged loop "
                "does not give. Use watch.micro_batches"
            )
        if self._reduction.holds_back and self._window.holds_back:
            raise PolicyError(
                "accumulate.sync: boundary is for a loop over watch.micro_batches, which knows the "
                "end of a window before its forward pass. In an unchanged loop leave sync out"
            )
        if self._window.target is not None:
            raise PolicyError(
                "accumulate.steps: {target: ...} counts samples, which an unchanged loop does not "
                "show. Use watch.micro_batches"
            )
        if passes > 1:
            self._accumulates_by_itself(passes)
        if found_inf is not None and bool(found_inf != 0):
            drop(self._parameters)
            self._ending = False  # what is stashed goes on into the next window
            return False
        if any(parameter.grad is not None for parameter in self._parameters):
            self._window.add()
        if not (self._ending or self._window.is_full):
            if self._window.count == 1:
                self._first.measure(1.0 if loss_scale is None else 1.0 / loss_scale)
            self._stash.take(loss_scale)
            return False
        if self._stash:
            self._stash.take(loss_scale)
            self._stash.give_back(loss_scale)
        self._ending = False
        self._has_stepped = True
        return True

    def end(self, due: bool) -> bool:
        """Ends the window at the next call; whether that must be made now.

        Args:
            due: whether a micro-batch waits for its call.
        """
        self._ending = due or bool(self._stash)
        return self._ending and not due

    def abandon(self) -> None:
        """Drops what belongs to a window that will not be finished."""
        if self._stash:
            say(
                logging.WARNING,
                "%d micro-batches of an unfinished window were dropped: call watch.end_window() "
                "behind the last one to step over them", self._window.count,
            )  # fmt: skip
            self._window.close()
        self._stash.clear()
        self._ending = False

    def _accumulates_by_itself(self, passes: int) -> None:
        said = (
            f"accumulate.drive is hook, which turns {self._window.num_steps} calls of step() into "
            f"one, and this loop ran {passes} backward passes before one. A loop that accumulates "
            "by itself needs drive: loop, and one with a GradScaler needs attach(scaler=...)"
        )
        if not self._has_stepped:
            raise PolicyError(said)
        say(logging.WARNING, "%s. The passes count as one micro-batch", said)
