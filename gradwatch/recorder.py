"""The training thread's end of a recording: rows and scalars in, never a wait.

engine -> Recorder -> ring -> Consumer (its own thread)
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from gradwatch.recording.cards import Card, write_card
from gradwatch.recording.ring import Ring, Row
from gradwatch.records import Culprit, Float32s, StepRecord
from gradwatch.saying import say

__all__ = ["Recorder"]


class Recorder:
    """Puts scalars with the step they belong to, and wakes the consumer when the ring fills."""

    def __init__(
        self,
        ring: Ring,
        wake: Callable[[], None],
        recording: Path | None = None,
        began: Callable[[int, float], None] = lambda step, total_norm: None,
    ) -> None:
        """
        Args:
            recording: where cards go; None keeps none.
            began: told of each record, by step and total norm.
        """
        self.ring = ring
        self._recording = recording
        self.culprits: deque[tuple[int, Culprit]] = deque(maxlen=ring.slots)
        """By step, until the consumer takes them."""

        self.cards: deque[Card] = deque(maxlen=ring.slots)
        """Those that could not be written in time; the consumer tries again."""

        self.loss_before = False
        """Whether the loss of the newest step was logged before it."""

        self.samples: deque[tuple[int, Float32s]] = deque(maxlen=ring.slots)
        """By step, until the consumer takes them."""

        self.local_norms: deque[tuple[int, float]] = deque(maxlen=ring.slots)
        """Of this process alone, by step, until the consumer takes them."""

        self._wake = wake
        self._began = began
        self._wake_every = max(1, ring.slots // 4)
        self._rows = 0
        self._newest = -1
        self._pending: dict[int, dict[str, float]] = {}
        """By step, of steps without a row yet."""

        self._times_logged: dict[tuple[int, str], int] = {}

        self._logged_before_step: set[str] = set()
        self._pid = os.getpid()
        self._told_late = False

    def log(self, scalars: Mapping[str, float], *, num_steps: int, backward_seen: bool) -> None:
        """Scalars of the step that is due, or of the one just done.

        After a backward pass they belong to the step that is due. Before one the place is
        ambiguous, since a loop may log between forward and backward or after `step()`; whichever
        a name did first, it is taken to do always.

        Args:
            num_steps: that were due so far.
            backward_seen: whether a backward pass ran since the last of them.
        """
        for name, value in scalars.items():
            step = self.step_of(name, num_steps=num_steps, backward_seen=backward_seen)
            self.put(name, step, value)

    def step_of(self, name: str, *, num_steps: int, backward_seen: bool) -> int:
        """The step that a scalar belongs to which is logged now; arguments as in `log`."""
        if num_steps == 0 and not backward_seen:
            self._logged_before_step.add(name)
        is_due = backward_seen or name in self._logged_before_step
        return num_steps if is_due else num_steps - 1

    def put(self, name: str, step: int, value: float) -> None:
        """A scalar of a step that is due, or of the newest."""
        if step > self._newest:
            pending = self._pending.setdefault(step, {})
            # Of several in one step the first that is not finite is not to be lost.
            if math.isfinite(pending.get(name, 0.0)):
                pending[name] = value
            self._times_logged[step, name] = self._times_logged.get((step, name), 0) + 1
        elif self._is_ours() and not self.ring.log(name, value) and not self._told_late:
            self._told_late = True
            say(logging.WARNING, "watch.log: %s came when the record of its step was closed "
                "by flush(); log before it", name)  # fmt: skip

    def loss_of(self, step: int) -> tuple[float | None, int]:
        """The loss that was logged for a step that is due, and how often one was."""
        loss = self._pending.get(step, {}).get("loss")
        self.loss_before = loss is not None
        return loss, self._times_logged.get((step, "loss"), 0)

    def defer(self, step: int, by: int) -> None:
        """What was logged for a step is that of a later one: some before it were never seen."""
        if step in self._pending:
            self._pending[step + by] = self._pending.pop(step)

    def append(self, row: Row) -> None:
        """One step; closes the record before it."""
        for step in [step for step in self._pending if step < row.step]:
            del self._pending[step]
        self._times_logged = {
            key: times for key, times in self._times_logged.items() if key[0] > row.step
        }
        if not self._is_ours():
            return
        self.ring.append(row, self._pending.pop(row.step, {}))
        self._newest = row.step
        self._began(row.step, row.total_norm)
        self._rows += 1
        if self._rows % self._wake_every == 0:
            self._wake()

    def sampled(self, step: int, samples_SP: Float32s) -> None:
        """What was sampled in a step; its record takes it along when it is handled."""
        if self._is_ours():
            self.samples.append((step, samples_SP))

    def investigated(self, step: int, culprit: Culprit, card: Card) -> None:
        """What went bad first in a step; back when it is in the recording, or will be later.

        Raises:
            sqlite3.Error: the card could not be written yet.
        """
        if not self._is_ours():
            return
        self.culprits.append((step, culprit))
        if self._recording is not None:
            try:
                write_card(self._recording, card)
            except BaseException:
                self.cards.append(card)
                raise

    def close_record(self) -> None:
        """Closes the newest record, so that the consumer may have it."""
        if self._is_ours():
            self.ring.close()

    def _is_ours(self) -> bool:
        """A forked child shares the memory of the ring, and must not write to it."""
        return os.getpid() == self._pid

    def newest(self, count: int) -> list[StepRecord]:
        """The newest records, oldest first; the open one is the last."""
        return self.ring.peek(count)
