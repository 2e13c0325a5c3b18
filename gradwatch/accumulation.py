"""Micro-batches in, one optimizer step out: what each one counts for.

    G = sum w_i g_i / sum w_i

The loss of a micro-batch is divided by planned / w, where `planned` is known when a window begins.
At its end planned / sum(w) is what is left to multiply by, `factor`: 1 for a full window of equal
weights, and what makes any other one exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from gradwatch.errors import GradwatchError, PolicyError
from gradwatch.policy import Accumulate, SampleTarget, Schedule
from gradwatch.saying import say

__all__ = ["Closed", "MicroBatch", "Window", "micro_batches", "samples_in"]

Batch = TypeVar("Batch")

FIRST = 3
"""Windows of a loop: where none of them is full, it is not the end of an epoch that is short."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that has ended."""

    micro_batches: int
    weight: float
    """Sum over the micro-batches."""

    factor: float
    """What the accumulated gradient is multiplied by."""

    planned: int = 0
    """Micro-batches that it was to have; 0 where it went on until it had its samples."""


class Window:
    """The micro-batches of the optimizer step that is due."""

    def __init__(self, accumulate: Accumulate | None) -> None:
        self._accumulate = accumulate
        self.step = 0
        """Of the optimizer; read when a window begins."""

        self.count = 0
        self.first_weight = 1.0
        """Of the first micro-batch."""

        self.is_exact = False
        """Whether a loop that divides does so by the micro-batches that came, not by the planned
        ones: a short window of it needs no repair."""

        self.common: float | None = None
        """What several processes count as the weight of one micro-batch, so that they divide their
        losses by the same number; None where it is not agreed yet."""

        self.agree: Callable[[float], float] | None = None
        """Finds that number from the first weight of each process; None for one process alone."""

        self._steps = 1
        self._planned = 1.0
        self._weight = 0.0
        self._samples = 0
        self._short: tuple[int, ...] | None = ()
        """Micro-batches of the first windows of a loop; None once they need no look any more."""

    def change(self, accumulate: Accumulate | None) -> None:
        """Other numbers, from the next window on."""
        self._accumulate = accumulate

    @property
    def weighs(self) -> bool:
        """Whether micro-batches have weights of their own."""
        return self._accumulate is not None and self._accumulate.weigh == "weight"

    @property
    def holds_back(self) -> bool:
        """Whether the policy asks for one reduction a window."""
        return self._accumulate is not None and self._accumulate.sync == "boundary"

    @property
    def target(self) -> int | None:
        """Samples that the window is to have; None where it counts micro-batches."""
        steps = None if self._accumulate is None else self._accumulate.steps
        return steps.target if isinstance(steps, SampleTarget) else None

    @property
    def num_steps(self) -> int:
        """Micro-batches that the window is to have."""
        return self._steps if self.count else self._steps_at(self.step)

    @property
    def is_full(self) -> bool:
        return self.count >= self.num_steps

    def steps_of(self, batches: int, *, partial: str) -> int:
        """Optimizer steps that so many more micro-batches end."""
        planned, left, steps = self.num_steps - (self.count or 0), batches, 0
        while left >= planned:
            left -= planned
            steps += 1
            planned = self._steps_at(self.step + steps)
        return steps + (left > 0 and partial == "step")

    def fills(self, samples: int) -> bool:
        """Whether one more micro-batch, of so many samples, fills the window."""
        if self.target is None:
            return self.count + 1 >= self.num_steps
        return (self._samples if self.count else 0) + samples >= self.target

    def add(self, weight: float = 1.0, samples: int = 1) -> float:
        """One more micro-batch; what its loss is to be divided by."""
        weigh = "mean" if self._accumulate is None else self._accumulate.weigh
        weight = weight if weigh == "weight" else 1.0
        if self.count == 0:
            self._steps = self._steps_at(self.step)
            if self.target is not None:
                self._steps = math.ceil(self.target / max(1, samples))
            self.first_weight = weight
            self._samples = 0
            self._planned = 1.0 if weigh == "sum" else self._plan(weight)
            self._weight = 0.0
        self.count += 1
        self._weight += weight
        self._samples += samples
        return self._planned / weight if weight else math.inf

    def _plan(self, weight: float) -> float:
        """What the losses of a window are divided by, per weight.

        Any number does that is the same for all of its micro-batches, those of other processes
        included; this one keeps losses near their size, so that float16 stays in range.
        """
        if self.agree is None or not (self.weighs or self.target is not None):
            return self._steps * (weight or 1.0)
        # With a target the number of micro-batches, too, is one's own.
        times = 1 if self.target is not None else self._steps
        if self.common is None:
            self.common = self.agree(weight * self._steps / times) or 1.0
        return self.common * times

    def take_back(self, weight: float = 1.0, samples: int = 1) -> None:
        """One micro-batch less: its gradient never came."""
        self.count -= 1
        self._weight -= weight if self.weighs else 1.0
        self._samples -= samples

    def close(self, *, divided: bool = True) -> Closed:
        """Ends the window; the next one begins with the next micro-batch.

        Args:
            divided: whether the losses were divided as `add` said.
        """
        weigh = "mean" if self._accumulate is None else self._accumulate.weigh
        exact = weigh == "sum" or self._weight == 0.0 or self.is_exact
        planned = self._planned if divided else 1.0
        factor = 1.0 if exact else planned / self._weight
        steps = 0 if self._accumulate is None or self.target is not None else self._steps
        closed = Closed(self.count, self._weight, factor, steps)
        self.count = 0
        return closed

    def counted(self, passes: int) -> Closed:
        """A window that the loop has made by itself, of so many backward passes."""
        for _ in range(passes):
            self.add()
        planned = self.num_steps
        closed = self.close()
        if passes > planned:  # several losses, not several micro-batches
            closed = replace(closed, factor=1.0)
        if self._short is not None:
            is_short = passes < planned and closed.factor != 1.0
            self._short = (*self._short, passes) if is_short else None
            if self._short is not None and len(self._short) == FIRST:
                self._say_short(self._short, planned, closed.factor)
                self._short = None
        return closed

    def _say_short(self, came: tuple[int, ...], planned: int, factor: float) -> None:
        say(
            logging.WARNING,
            "the first %d windows of this loop had %s micro-batches, and accumulate.steps is %d: "
            "drive: loop takes each loss as divided by %d, so the gradients of a window of %d "
            "are multiplied by %g. That is right for a loop that divides by %d; one that divides "
            "by %d gets gradients %g times too large, and needs "
            "accumulate: {steps: %d, drive: loop}",
            len(came), ", ".join(map(str, came)), planned, planned, came[-1], factor, planned,
            came[-1], factor, came[-1],
        )  # fmt: skip

    def _steps_at(self, step: int) -> int:
        steps = 1 if self._accumulate is None else self._accumulate.steps
        if isinstance(steps, Schedule):
            # Stairs: the last point at or before this step, else the first one.
            values = [value for first, value in steps.points if first <= step]
            steps = int(values[-1] if values else steps.points[0][1])
        return steps if isinstance(steps, int) else 1


class MicroBatch(Generic[Batch]):
    """One batch of a loader, and its place in the window of its optimizer step."""

    def __init__(
        self,
        batch: Batch,
        *,
        last: bool,
        window: Window,
        samples: int = 1,
        ends_loader: bool = False,
        began: Callable[[MicroBatch[Any]], None] = lambda micro: None,
        ended: Callable[[MicroBatch[Any]], None] = lambda micro: None,
    ) -> None:
        self.batch = batch
        self.samples = samples
        """How many it holds; 1 where the policy does not count them."""

        self.last = last
        """Whether its step is due when it was used: known before its forward pass."""

        self.syncs = last or ends_loader
        """Whether its backward pass reduces the gradients over all processes, where the policy
        leaves that to the end of a window: an epoch does not end with gradients that are not."""

        self.failed = False
        """Whether it ended in an exception, and has no part in its window."""

        self._window = window
        self._weight = 1.0
        self._began = began
        self._ended = ended
        self.divisor: float | None = None
        """What its loss was divided by; None before."""

    def scale(self, loss: Any, weight: float = 1.0) -> Any:
        """The loss to call `backward` on: divided so that the window's gradients add up to G.

        Args:
            loss: a mean over the micro-batch (a sum for `weigh: sum`). Of several losses each one
                is scaled, with the same weight.
            weight: for `weigh: weight`, e.g. the number of samples or tokens that the mean is of.
        """
        if self.divisor is None:
            self._weight = float(weight)
            self.divisor = self._window.add(self._weight, self.samples)
        elif float(weight) != self._weight:
            raise GradwatchError(
                f"micro.scale: a micro-batch has one weight. It was {self._weight:g} and is "
                f"{float(weight):g} now; pass the same for each of its losses"
            )
        return loss if self.divisor == 1.0 else loss / self.divisor

    def __enter__(self) -> Self:
        self._began(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.failed = error is not None
        if self.failed and self.divisor is not None:
            self._window.take_back(self._weight, self.samples)
        if error is None and self.divisor is None:
            raise GradwatchError(
                "a micro-batch has ended whose loss was not scaled: the sum of its gradients would "
                "not be their mean. Call micro.scale(loss).backward() inside `with micro:`"
            )
        self._ended(self)


def samples_in(batch: Any) -> int:
    """The length of the first array or tensor in a batch: of itself, or of what it holds.

    Raises:
        PolicyError: there is none.
    """
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        shape = getattr(part, "shape", None)
        if shape is not None and len(shape):
            return int(shape[0])
        if isinstance(part, Mapping):
            waiting += reversed(list(part.values()))
        elif isinstance(part, (list, tuple)):
            waiting += reversed(part)
        elif hasattr(part, "__dict__"):
            waiting += reversed(list(vars(part).values()))
    raise PolicyError(
        "accumulate.steps: {target: ...} counts samples, and a batch of type "
        f"{type(batch).__name__} holds no array. Pass watch.micro_batches(loader, samples=...), "
        "a function of a batch"
    )


def micro_batches(
    loader: Iterable[Batch],
    window: Window,
    *,
    partial: str,
    discard: Callable[[], None],
    samples: Callable[[Batch], int] = samples_in,
    began: Callable[[MicroBatch[Any]], None] = lambda micro: None,
    ended: Callable[[MicroBatch[Any]], None] = lambda micro: None,
) -> Iterator[MicroBatch[Batch]]:
    """The batches of a loader, each with its place; looks one ahead for the end of the loader.

    Args:
        partial: what becomes of a window that the loader ends: `step`, `drop` or `carry`.
        discard: drops the gradients of a window that is not finished.
        samples: counts those of a batch, where the window is to have so many.
        began: called before the forward pass of each micro-batch.
        ended: called behind each micro-batch, failed ones included.
    """
    end = object()
    batches = iter(loader)
    batch: Any = next(batches, end)
    while batch is not end:
        following: Any = next(batches, end)
        held = 1 if window.target is None else int(samples(batch))
        ends = following is end
        micro = MicroBatch(
            batch, last=window.fills(held) or (ends and partial == "step"), window=window,
            samples=held, ends_loader=ends, began=began, ended=ended,
        )  # fmt: skip
        yield micro
        if micro.last and window.count and not micro.failed:
            window.close()  # its step was not taken: a loss scaler dropped it
        batch = following
    if window.count and partial == "drop":
        window.close()
        discard()
