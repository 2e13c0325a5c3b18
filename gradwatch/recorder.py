"""The training thread's end of a recording: rows and scalars in, never a wait.

engine -> Recorder -> ring -> Consumer (its own thread)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.recording.ring import Ring, Row
from gradwatch.records import StepRecord

__all__ = ["Recorder"]


class Recorder:
    """Puts scalars with the step they belong to, and wakes the consumer when the ring fills."""

    def __init__(self, ring: Ring, wake: Callable[[], None]) -> None:
        self.ring = ring
        self._wake = wake
        self._wake_every = max(1, ring.slots // 4)
        self._rows = 0
        self._pending: dict[str, float] = {}
        self._logged_before_step: set[str] = set()

    def log(self, scalars: Mapping[str, float], *, backward_seen: bool) -> None:
        """Scalars of the step that is due, or of the one just done.

        After a backward pass they belong to the step that is due. Before one the place is
        ambiguous, since a loop may log between forward and backward or after `step()`; whichever
        a name did first, it is taken to do always.
        """
        for name, value in scalars.items():
            if self._rows == 0 and not backward_seen:
                self._logged_before_step.add(name)
            if backward_seen or name in self._logged_before_step:
                self._pending[name] = value
            else:
                self.ring.log(name, value)

    def append(self, row: Row) -> None:
        """One step; closes the record before it."""
        pending, self._pending = self._pending, {}
        self.ring.append(row, pending)
        self._rows += 1
        if self._rows % self._wake_every == 0:
            self._wake()

    def close_record(self) -> None:
        """Closes the newest record, so that the consumer may have it."""
        self.ring.close()

    def newest(self, count: int) -> list[StepRecord]:
        """The newest records, oldest first; the open one is the last."""
        return self.ring.peek(count)
