"""The host's end of a graph: rows of the ring in, steps for the engine out.

Decisions.read  ->  (what was packed, DueStep) in order  ->  Engine.catch_up
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from gradwatch.backend import StepContext
from gradwatch.due_step import DueStep
from gradwatch.recorder import Recorder
from gradwatch.rules.arrays import NUMPY
from gradwatch.rules.culprit import Clues, Forward
from gradwatch.tensorflow.decisions import Decisions

__all__ = ["REST_SECONDS", "GraphSteps", "ReadingThread"]

REST_SECONDS = 0.5
"""Between two reads at most. Each takes the interpreter from the trainer, and finds nothing of
what it needs in the caches: ten rows at once cost little more than one."""

FIRST_REST_SECONDS = 0.05
"""While nobody knows how long a step is. It grows no faster than twofold: the first one is traced
and tells nothing of the others."""

FULL = 0.25
"""Of a ring, at which it is read sooner."""

NOTHING_KEPT = Clues(
    forward=Forward(evidence="flags", unknown="a graph of TensorFlow keeps nothing of it")
)


class GraphSteps:
    """What the engine asks of a backend whose steps are decided and applied in a graph."""

    xp = NUMPY
    agrees = False
    reads_host = False

    def __init__(self, decisions: Decisions) -> None:
        self.recorder: Recorder | None = None
        """Takes the losses that the graph knows."""

        self.take_sample: Callable[[int, Any], None] = lambda step, sampled: None
        """Takes a sample, by step."""

        self.rest_seconds = FIRST_REST_SECONDS
        """How long there is nothing to read that would be lost."""

        self._decisions = decisions
        self._last = (time.time(), time.perf_counter())

    def arrived(self, *, wait: bool) -> Iterator[tuple[Any, DueStep | Callable[[Any], None]]]:
        """Steps since the last time, oldest first. A graph does not tell when a step was made: they
        are spread over the time since, of which there is little."""
        rows = self._decisions.read()
        before, self._last = self._last, (time.time(), time.perf_counter())
        if rows:
            per_row = (self._last[1] - before[1]) / len(rows)
            to_full = FULL * self._decisions.ring.slots * per_row
            self.rest_seconds = min(REST_SECONDS, to_full, 2 * self.rest_seconds)
        for i, (number, trace, facts, packed) in enumerate(rows, start=1):
            unix, counter = (
                then + (now - then) * i / len(rows)
                for then, now in zip(before, self._last, strict=True)
            )
            micro_batches, weight, learning_rate, loss = (float(x) for x in facts)
            step = DueStep(
                number=number,
                started=counter,
                time=unix,
                context=StepContext(
                    micro_batches=int(micro_batches), weight=weight, learning_rate=learning_rate
                ),
                limits=[],
                present=trace.present,
                rules=self._decisions.chain.rules(trace.present),
                loss=self._loss(number, loss if trace.has_loss else None),
            )
            yield packed, step
        # Behind their steps, which are on their way to the consumer by then.
        for number, row in self._decisions.sampled():
            yield row, functools.partial(self.take_sample, number)

    def seen(self) -> None:
        return None

    def was_finite(self, seen: Any) -> None:
        pass

    def confer(self, step: int, word: bytes) -> tuple[()]:
        return ()

    def clues(self, seen: Any, *, is_over: bool) -> Clues:
        return NOTHING_KEPT

    def _loss(self, step: int, loss: float | None) -> float | None:
        assert self.recorder is not None
        if loss is None:
            return self.recorder.loss_of(step)[0]
        self.recorder.log({"loss": loss}, num_steps=step + 1, backward_seen=False)
        return loss


class ReadingThread:
    """Calls a method for as long as its object lives, and rests for the seconds that it returns."""

    def __init__(self, method: Callable[[], float], rest: float) -> None:
        """
        Args:
            rest: seconds before the first call.
        """
        self._method = weakref.WeakMethod(method)
        self._rest = rest
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradwatch-graph", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        rest = self._rest
        while not self._ended.wait(rest):
            method = self._method()
            if method is None:
                return
            rest = method()
            del method
