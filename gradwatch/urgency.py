"""Total norms in, the step whose record cannot wait for the next step out.

A record stays open until the next step, for what is logged behind its own. A process that dies of
an explosion takes no next step, so a norm that is out of the ordinary has its record looked at
while it is open. A comparison on the training thread; all else is done by the consumer.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable

from gradwatch.records import StepRecord

__all__ = ["Urgency"]

REMEMBERED, WARMUP = 64, 16
"""Steps that the usual norm is the median of, and how many have to be known."""

FACTOR = 3.0
"""Below every bound of the detectors: looking at a step too early costs a wake of the consumer."""


class Urgency:
    """Shared by the thread that trains, which asks, and the consumer, which teaches."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """
        Args:
            wake: has the consumer look now.
        """
        self.step = -1
        """The step that is to be looked at, or one that was; -1 before there is any."""

        self._wake = wake
        self._limit = sys.float_info.max
        self._is_calm = True
        self._norms: deque[float] = deque(maxlen=REMEMBERED)

    def see(self, step: int, total_norm: float) -> None:
        """A record was begun. Called on the training thread."""
        if self._is_calm and not total_norm <= self._limit:  # NaN is not
            self.step = step
            self._wake()

    def learn(self, records: Iterable[StepRecord], *, is_calm: bool) -> None:
        """Records were handled. Called by the consumer.

        Args:
            is_calm: whether no alert is open; nothing is urgent once one is.
        """
        self._is_calm = is_calm
        norms = [record.total_norm for record in records if math.isfinite(record.total_norm)]
        if norms:
            self._norms += norms
            if len(self._norms) >= WARMUP:
                self._limit = FACTOR * statistics.median(self._norms)
