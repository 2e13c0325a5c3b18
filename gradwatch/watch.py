"""The watch as its user sees it: read what happened, log beside it, end it.

Framework-free; a framework's watch adds how it sits in the loop.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat, TypeVar

from gradwatch.accumulation import MicroBatch, Window, micro_batches, samples_in
from gradwatch.backend import Backend, StepContext
from gradwatch.describing import described
from gradwatch.engine import Engine
from gradwatch.errors import GradwatchError, PolicyError, TrainingStopped
from gradwatch.pipeline import Pipeline, close_at_exit, state_after
from gradwatch.policy import Policy
from gradwatch.records import Anomaly, RunInfo, StepRecord
from gradwatch.saying import say

__all__ = ["Watch"]

Batch = TypeVar("Batch")
STATE_VERSION = 1


class Watch:
    """What `gradwatch.attach` returns; also a context manager that closes itself."""

    def __init__(
        self,
        info: RunInfo,
        policy: Policy,
        backend: Backend,
        recording: str | Path | None,
    ) -> None:
        self.follows_its_policy = True
        """Whether a policy file is read again while the run goes on."""

        self.url: str | None = None
        """Where the metrics are served, or None."""

        self.pipeline = Pipeline(info, policy, recording)
        """What runs behind the loop; for the parts of gradwatch that export it."""

        self._engine = Engine(info, policy, backend, self.pipeline.recorder, self.pipeline.report)
        self.pipeline.before_close = weakref.WeakMethod(self._engine.catch_up)
        self.pipeline.consumer.stop_run = weakref.WeakMethod(self._engine.stop_soon)
        self._unloggable: set[str] = set()
        # In shadow mode nothing is touched: each micro-batch is a window.
        self._accumulate = policy.accumulate if policy.mode == "enforce" else None
        self.window = Window(self._accumulate)
        """The micro-batches of the step that is due."""

        self._marked = False
        """Whether the loop tells its micro-batches apart by `micro_batches`."""

        # Also runs at interpreter exit, so that a loop that never closes loses nothing.
        self._finalizer = weakref.finalize(self, close_at_exit, self.pipeline)

    # What happened

    @property
    def latest(self) -> StepRecord | None:
        """The record of the newest step, or None before the first."""
        newest = self.history(1)
        return newest[0] if newest else None

    def history(self, count: int) -> list[StepRecord]:
        """The newest records, oldest first; at most the 256 that are kept in memory.

        Anomalies are found on another thread, some 0.1 s later: `flush()` first to have them all.
        """
        handled = self.pipeline.consumer.finished()
        found = []
        for record in self.pipeline.recorder.newest(count):
            known = handled.get(record.step)
            if known is not None:
                record = replace(
                    record, anomalies=known.anomalies, culprit=known.culprit,
                    samples=known.samples, local_norm=known.local_norm,
                )  # fmt: skip
            found.append(record)
        return found

    @property
    def skipped(self) -> str | None:
        """Why the last step was skipped (`nonfinite`, `overflow` or the name of a rule), or None.

        For a learning-rate schedule that should stand still with the optimizer. Where the decision
        is on an accelerator this waits for it.
        """
        return self._engine.skipped

    @property
    def healthy_since(self) -> int | None:
        """The first step behind the last alert; None while one is open.

        A checkpoint of step s is to be trusted once `healthy_since <= s` still holds some fifty
        steps later. Records are diagnosed some 0.1 s late: `flush()` first.
        """
        consumer = self.pipeline.consumer
        return None if consumer.open_anomalies() else consumer.unhealthy + 1

    @property
    def enforcing(self) -> bool:
        """Whether the policy's decisions are applied."""
        return self._engine.enforcing

    @property
    def recording(self) -> Path | None:
        """The recording's file, or None where nothing is recorded."""
        return self.pipeline.path

    @property
    def info(self) -> RunInfo:
        return self.pipeline.info

    # What else there is to know

    def log(self, **scalars: SupportsFloat) -> None:
        """Puts numbers beside the gradients: `watch.log(loss=loss)`.

        Called after a backward pass they belong to the step that is due, else to the step just
        done. Tensors of one element are welcome. What is no number is left out, with one warning.
        """
        values = {}
        for name, value in scalars.items():
            try:
                if not self._sends(name, value):
                    values[name] = self._number(value)
            except Exception as error:
                self._warn_unloggable(name, value, error)
        try:
            self.pipeline.recorder.log(
                values, num_steps=self._engine.num_steps, backward_seen=self._backward_seen()
            )
        except Exception:
            self.pipeline.report("readback")

    def _warn_unloggable(self, name: str, value: object, error: Exception) -> None:
        if name in self._unloggable:
            return
        self._unloggable.add(name)
        say(
            logging.WARNING,
            "watch.log: %s must be one number. Received: a %s (%s); it is left out",
            name, type(value).__name__, error,
        )  # fmt: skip

    def on_anomaly(self, callback: Callable[[Anomaly], None]) -> None:
        """Calls back once for each anomaly, on gradwatch's own thread.

        An exception in the callback is logged and counted, and reaches nobody else.
        """
        self.pipeline.consumer.callbacks.append(callback)

    def process(self) -> None:
        """Measures, clips and records the gradients that are due: what the step hook calls.

        For loops that own the step: call it after the last backward, before the update.

        Raises:
            TrainingStopped: the policy says stop.
        """
        was_enforcing = self._engine.enforcing
        context = self._guarded_context()
        if self.pipeline.reloading is not None:
            self.pipeline.reloading.apply(self._engine.num_steps, self._change)
        try:
            self._engine.step(context)
        except TrainingStopped:
            self.pipeline.stopped = True
            self.pipeline.tally.set_state("stopped")
            raise
        if was_enforcing != self._engine.enforcing:
            self.pipeline.tally.set_enforcing(self._engine.enforcing)

    def _change(self, policy: Policy) -> None:
        """Goes on under a policy with other numbers."""
        self._engine.change(policy)
        if self._accumulate is not None:
            self._accumulate = policy.accumulate
            self.window.change(policy.accumulate)

    def _guarded_context(self) -> StepContext:
        try:
            context = self._context()
            self.pipeline.recorder.defer(self._engine.num_steps, context.overflows)
        except Exception:
            self.pipeline.report("measure")
            return StepContext()
        return context

    # Going on later

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped: put it in your checkpoint.

        Plain values, lists and arrays (tensors in torch), by the names of rules, layers and
        parameters. A window of micro-batches that is not finished is not part of it.

        Raises:
            GradwatchError: micro-batches are accumulated at this moment.
        """
        if self.window.count:
            raise GradwatchError(
                f"{self.window.count} of {self.window.num_steps} micro-batches are accumulated, "
                "and their gradients are not part of a checkpoint. Save behind optimizer.step()"
            )
        self.flush()
        with self.pipeline.consumer.paused():
            detection = self.pipeline.consumer.detection.state_dict()
            unhealthy = self.pipeline.consumer.unhealthy
        return {
            "version": STATE_VERSION,
            "engine": self._engine.state_dict(),
            "detection": detection,
            "unhealthy": unhealthy,
            "common_weight": self.window.common or 0.0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; before the first step.

        Rules that are new, or learn in another way, begin anew with one warning, and so does
        detection where layers or detectors are others.

        Raises:
            GradwatchError: it is the state of another version.
        """
        if state.get("version") != STATE_VERSION:
            raise GradwatchError(
                f"the state must be of version {STATE_VERSION}. "
                f"Received: {state.get('version')!r}. Leave it out to begin anew"
            )
        self.flush()
        self._engine.load_state_dict(state["engine"])
        self.window.step = self._engine.num_steps
        self.window.common = float(state.get("common_weight", 0.0)) or None
        try:
            with self.pipeline.consumer.paused():
                self.pipeline.consumer.unhealthy = int(
                    state.get("unhealthy", self._engine.num_steps - 1)
                )
                self.pipeline.consumer.detection.load_state_dict(state["detection"])
        except ValueError as error:
            say(logging.WARNING, "detection begins anew: %s", error)

    # Accumulation

    def micro_batches(
        self, loader: Iterable[Batch], *, samples: Callable[[Batch], int] = samples_in
    ) -> Iterator[MicroBatch[Batch]]:
        """The batches of a loader, as micro-batches of the policy's `accumulate`.

            for micro in watch.micro_batches(loader):
                with micro:
                    loss = criterion(model(micro.batch.x), micro.batch.y)
                    micro.scale(loss).backward()
                if micro.last:
                    optimizer.step()
                    optimizer.zero_grad()

        Looks one batch ahead, so that `micro.last` is known before the forward pass. A last,
        shorter window is handled as the policy's `partial` says; the gradient is exact.

        Args:
            samples: counts those of a batch, for `steps: {target: ...}`; by default the length of
                the first tensor in it.

        Raises:
            PolicyError: `drive: loop` says that the loop itself divides.
        """
        accumulate = self._accumulate
        if accumulate is not None and accumulate.drive == "loop":
            raise PolicyError(
                "watch.micro_batches divides the loss, and accumulate.drive: loop says that the "
                "loop does. Use drive: hook, or a plain loop"
            )
        partial = "step" if accumulate is None else accumulate.partial
        return self._marked_batches(loader, partial, samples)

    def _marked_batches(
        self, loader: Iterable[Batch], partial: str, samples: Callable[[Batch], int]
    ) -> Iterator[MicroBatch[Batch]]:
        self._abandon()
        self._marked = True
        if self.window.count and not (partial == "carry" and self._has_gradients()):
            say(
                logging.WARNING, "%d micro-batches of a window that was not finished were dropped",
                self.window.count,
            )  # fmt: skip
            self.window.close()
            self._discard()
        self.window.step = self._engine.num_steps
        self._begin_epoch(loader, partial)
        try:
            yield from micro_batches(
                loader, self.window, partial=partial, discard=self._discard, samples=samples,
                began=self._micro_began, ended=self._micro_ended,
            )  # fmt: skip
        finally:
            self._marked = self.window.count > 0

    def end_window(self) -> None:
        """Ends the window of an unchanged loop early, e.g. at the end of an epoch.

        Before `step()` of the last micro-batch that step is taken, over what arrived. After it
        the step is taken here. Where nothing was accumulated nothing happens.
        """
        self._end_window()

    # The end

    def flush(self) -> None:
        """Waits until every step so far is diagnosed, counted and on disk (10 s at most)."""
        self._engine.catch_up(wait=True)
        if not self.pipeline.flush():
            say(logging.WARNING, "flush: gradwatch's thread did not catch up within 10 seconds")

    def close(self) -> None:
        """Detaches from the loop and ends the recording; a second call does nothing."""
        self._end("finished")

    def _end(self, state: str) -> None:
        self._detach()
        self._finalizer.detach()
        self._engine.catch_up(wait=True)
        self.pipeline.stopped |= self._engine.is_stopping
        self.pipeline.close(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(state_after(error))

    def __repr__(self) -> str:
        return f"Watch({described(self)}{self._how()})"

    # What a framework fills in

    def _how(self) -> str:
        """How decisions are made, for `repr`."""
        return ""

    def _discard(self) -> None:
        """Drops the gradients of a window that was not finished."""

    def _begin_epoch(self, loader: object, partial: str) -> None:
        """A loop over the micro-batches of a loader begins."""

    def _micro_began(self, micro: MicroBatch[Any]) -> None:
        """A marked micro-batch is about to run forward."""

    def _micro_ended(self, micro: MicroBatch[Any]) -> None:
        """A marked micro-batch has run backward, or has failed to."""

    def _has_gradients(self) -> bool:
        """Whether there are any that are not 0."""
        return False

    def _abandon(self) -> None:
        """Drops what an unchanged loop has accumulated."""

    def _end_window(self) -> None:
        """Closes the window with the gradients that are due, or takes its step now."""

    def _context(self) -> StepContext:
        """What the loop knows about the step that is due."""
        return StepContext()

    def _sends(self, name: str, value: SupportsFloat) -> bool:
        """Whether a logged scalar comes to the host by itself, later."""
        return False

    def _number(self, value: SupportsFloat) -> float:
        """A logged scalar, on the host."""
        return float(value)

    def _backward_seen(self) -> bool:
        """Whether a backward pass ran since the last step."""
        return False

    def _detach(self) -> None:
        """Takes the hooks off the loop."""
