"""Everything behind the training thread, put together and taken apart in order.

Recorder -> Ring -> Consumer -> Detection, Tally, Store
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gradwatch.consumer import Consumer
from gradwatch.errors import TrainingStopped
from gradwatch.failures import Reporter
from gradwatch.policy import Policy, PolicyFile
from gradwatch.recorder import Recorder
from gradwatch.recording.ring import Ring
from gradwatch.recording.store import Store, new_recording_path
from gradwatch.recording.writer import process_table
from gradwatch.records import RunInfo
from gradwatch.reloading import Reloading
from gradwatch.rules.detection import KINDS, Detection
from gradwatch.tally import Tally
from gradwatch.termination import end_before_sigterm, forget

__all__ = ["Pipeline", "close_at_exit", "state_after"]

FLUSH_SECONDS = 10.0
TERMINATION_SECONDS = 2.0
"""For the records that are left where the process is being killed."""


class Pipeline:
    """One run's recorder, consumer, tally and store."""

    def __init__(self, info: RunInfo, policy: Policy, directory: str | os.PathLike[str] | None):
        """Opens the recording and starts the consumer.

        A recording that cannot be opened is reported, counted and left out; the run is watched
        all the same.
        """
        self.tally = Tally(replace(info, process_table=process_table()), kinds=KINDS)
        self.tally.set_enforcing(policy.enforcing)
        self.report = Reporter(self.tally)
        self.stopped = False
        """Whether the policy has ended the run."""

        self._pid = os.getpid()
        self.path: Path | None = None
        self.closers: list[Callable[[], None]] = []
        """Run at the end of `close`, after the last record was handled."""

        self.before_close: Callable[[], Callable[..., None] | None] = lambda: None
        """A reference to what hands over the last records (wait=True); it may be gone."""

        self.ring, store = self._opened(directory)
        self.consumer = Consumer(
            self.ring,
            detection=Detection(info.layout, policy.detect, is_shadow=info.is_shadow),
            detect=policy.detect,
            tally=self.tally,
            store=store,
            report=self.report,
        )
        self.recorder = Recorder(
            self.ring, self.consumer.wake, self.path, self.consumer.urgency.see
        )
        self.consumer.samples = self.recorder.samples
        self.consumer.local_norms = self.recorder.local_norms
        self.consumer.culprits = self.recorder.culprits
        self.consumer.cards = self.recorder.cards
        self.consumer.loss_before = lambda: self.recorder.loss_before
        self.reloading: Reloading | None = None
        self._closed = False
        self._ended = threading.Event()
        self.is_terminated = False
        """Whether SIGTERM is what ends the run."""

        self.is_interrupted = False
        """Whether somebody has pressed Ctrl-C while it ends: nothing is to be waited for."""

        self.consumer.start()

    @property
    def info(self) -> RunInfo:
        return self.tally.info

    def follow(self, file: PolicyFile) -> None:
        """Takes over new numbers of the policy file while the run goes on."""
        self.reloading = Reloading(file, self.consumer.changes.append, self.report)
        self.consumer.chores.append(self.reloading.poll)

    def _opened(self, directory: str | os.PathLike[str] | None) -> tuple[Ring, Store | None]:
        if directory is None:
            return Ring(self.info, None), None
        try:
            store = self._new_store(directory)
        except Exception:
            self.report("recording")
            return Ring(self.info, None), None
        self.path = store.path
        try:
            return Ring(self.info, store.path.with_suffix(".ring")), store
        except Exception:
            self.report("recording")
            return Ring(self.info, None), store

    def _new_store(self, directory: str | os.PathLike[str]) -> Store:
        info = self.info
        while True:
            path = new_recording_path(directory, info.run, info.rank, info.started)
            try:
                return Store(path, info)
            except FileExistsError:  # another process was quicker
                continue

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Closes the newest record and waits until all are handled; False if that took too long."""
        self.recorder.close_record()
        return self.consumer.flush(timeout)

    def end_before_sigterm(self) -> None:
        """Has the run end in order where SIGTERM would end the process."""
        end_before_sigterm(self)

    @property
    def is_ending(self) -> bool:
        """Whether `close` is under way."""
        return self._closed and not self.is_terminated and not self._ended.is_set()

    def close(self, state: str) -> None:
        """Handles what is left and ends everything.

        A second call does nothing, nor does one in a forked child: all of this is its parent's.

        Raises:
            KeyboardInterrupt: in a wait, which that has ended; everything is closed all the same.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            if hand_over := self.before_close():
                try:
                    hand_over(wait=True)
                except Exception:
                    self.report("readback")
            self._end(state, FLUSH_SECONDS)
        finally:
            self._ended.set()
            forget(self)

    def terminate(self) -> None:
        """`close` on another thread, while the one that trains is held anywhere or hangs: what is
        on an accelerator still is left there."""
        if self._closed:
            self._ended.wait()
        elif os.getpid() == self._pid:
            self._closed = self.is_terminated = True
            self._end("crashed", TERMINATION_SECONDS)

    def _end(self, state: str, seconds: float) -> None:
        self.recorder.close_record()
        self._guarded(self.consumer.stop, "stopped" if self.stopped else state, seconds)
        for closer in self.closers:
            self._guarded(closer)
        if self.consumer.ended and self.consumer.unstored == 0 and self.ring.all_taken:
            self.ring.release()  # all of it is in the store
        if self.is_interrupted:
            raise KeyboardInterrupt

    def _guarded(self, end: Callable[..., None], *args: object) -> None:
        try:
            end(*args)
        except Exception:
            self.report("export")
        except KeyboardInterrupt:
            self.is_interrupted = True


def state_after(error: BaseException | None) -> str:
    """How a run has ended that an exception, or none, has ended."""
    if error is None:
        return "finished"
    by_will = isinstance(error, (TrainingStopped, KeyboardInterrupt))
    return "stopped" if by_will else "crashed"


def close_at_exit(pipeline: Pipeline) -> None:
    """The interpreter keeps the exception that ended a script in `sys.last_value`."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    with contextlib.suppress(KeyboardInterrupt):  # which has ended a wait, and all there is to end
        pipeline.close(state_after(error))
