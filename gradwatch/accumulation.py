"""Micro-batches in, one optimizer step out: what each one counts for.

    G = sum w_i g_i / sum w_i

The loss of a micro-batch is divided by planned / w, where `planned` is known when a window begins.
At its end planned / sum(w) is what is left to multiply by, `factor`: 1 for a full window of equal
weights, and what makes any other one exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from gradwatch.errors import GradwatchError
from gradwatch.policy import Accumulate, Schedule

__all__ = ["Closed", "MicroBatch", "Window", "micro_batches"]

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that has ended."""

    micro_batches: int
    weight: float
    """Sum over the micro-batches."""

    factor: float
    """What the accumulated gradient is multiplied by."""


class Window:
    """The micro-batches of the optimizer step that is due."""

    def __init__(self, accumulate: Accumulate | None) -> None:
        self._accumulate = accumulate
        self.step = 0
        """Of the optimizer; read when a window begins."""

        self.count = 0
        self._steps = 1
        self._planned = 1.0
        self._weight = 0.0

    @property
    def weighs(self) -> bool:
        """Whether micro-batches have weights of their own."""
        return self._accumulate is not None and self._accumulate.weigh == "weight"

    @property
    def num_steps(self) -> int:
        """Micro-batches that the window is to have."""
        return self._steps if self.count else self._steps_now()

    @property
    def is_full(self) -> bool:
        return self.count >= self.num_steps

    def add(self, weight: float = 1.0) -> float:
        """One more micro-batch; what its loss is to be divided by."""
        weigh = "mean" if self._accumulate is None else self._accumulate.weigh
        weight = weight if weigh == "weight" else 1.0
        if self.count == 0:
            self._steps = self._steps_now()
            # Any number does that stays the same within the window; this one keeps losses near
            # their size, so that float16 stays in range.
            self._planned = 1.0 if weigh == "sum" else self._steps * (weight or 1.0)
            self._weight = 0.0
        self.count += 1
        self._weight += weight
        return self._planned / weight if weight else math.inf

    def take_back(self, weight: float = 1.0) -> None:
        """One micro-batch less: its gradient never came."""
        self.count -= 1
        self._weight -= weight if self.weighs else 1.0

    def close(self, *, divided: bool = True) -> Closed:
        """Ends the window; the next one begins with the next micro-batch.

        Args:
            divided: whether the losses were divided as `add` said.
        """
        weigh = "mean" if self._accumulate is None else self._accumulate.weigh
        exact = weigh == "sum" or self._weight == 0.0
        planned = self._planned if divided else 1.0
        closed = Closed(self.count, self._weight, 1.0 if exact else planned / self._weight)
        self.count = 0
        return closed

    def _steps_now(self) -> int:
        steps = 1 if self._accumulate is None else self._accumulate.steps
        if isinstance(steps, Schedule):
            # Stairs: the last point at or before this step, else the first one.
            values = [value for step, value in steps.points if step <= self.step]
            steps = int(values[-1] if values else steps.points[0][1])
        assert isinstance(steps, int), "targets of samples are refused when a policy is loaded"
        return steps


class MicroBatch(Generic[Batch]):
    """One batch of a loader, and its place in the window of its optimizer step."""

    def __init__(self, batch: Batch, *, last: bool, window: Window) -> None:
        self.batch = batch
        self.last = last
        """Whether its step is due when it was used: known before its forward pass."""

        self.failed = False
        """Whether it ended in an exception, and has no part in its window."""

        self._window = window
        self._weight = 1.0
        self._divisor: float | None = None

    def scale(self, loss: Any, weight: float = 1.0) -> Any:
        """The loss to call `backward` on: divided so that the window's gradients add up to G.

        Args:
            loss: a mean over the micro-batch (a sum for `weigh: sum`). Of several losses each one
                is scaled, with the same weight.
            weight: for `weigh: weight`, e.g. the number of samples or tokens that the mean is of.
        """
        if self._divisor is None:
            self._weight = float(weight)
            self._divisor = self._window.add(self._weight)
        elif float(weight) != self._weight:
            raise GradwatchError(
                f"micro.scale: a micro-batch has one weight. It was {self._weight:g} and is "
                f"{float(weight):g} now; pass the same for each of its losses"
            )
        return loss if self._divisor == 1.0 else loss / self._divisor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.failed = error is not None
        if self.failed and self._divisor is not None:
            self._window.take_back(self._weight)
        if error is None and self._divisor is None:
            raise GradwatchError(
                "a micro-batch has ended whose loss was not scaled: the sum of its gradients would "
                "not be their mean. Call micro.scale(loss).backward() inside `with micro:`"
            )


def micro_batches(
    loader: Iterable[Batch], window: Window, *, partial: str, discard: Callable[[], None]
) -> Iterator[MicroBatch[Batch]]:
    """The batches of a loader, each with its place; looks one ahead for the end of the loader.

    Args:
        partial: what becomes of a window that the loader ends: `step`, `drop` or `carry`.
        discard: drops the gradients of a window that is not finished.
    """
    end = object()
    batches = iter(loader)
    batch: Any = next(batches, end)
    while batch is not end:
        following: Any = next(batches, end)
        full = window.count + 1 >= window.num_steps
        ended = following is end and partial == "step"
        micro = MicroBatch(batch, last=full or ended, window=window)
        yield micro
        if micro.last and window.count and not micro.failed:
            window.close()  # its step was not taken: a loss scaler dropped it
        batch = following
    if window.count and partial == "drop":
        window.close()
        discard()
