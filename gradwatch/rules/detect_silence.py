"""`stuck`, its other half: no step for long. The only finding that reads a clock."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from gradwatch.policy.detectors import Stuck
from gradwatch.records import Anomaly, StepRecord

__all__ = ["Silence"]

REMEMBERED = 64
"""Steps whose durations the median is taken of."""


class Silence:
    """Steps and moments in, one anomaly for each silence out."""

    def __init__(self, config: Stuck | None, now: float) -> None:
        """
        Args:
            now: seconds, by any clock that only goes forward.
        """
        self._config = config
        self._since = now
        self._told = False
        self._step: int | None = None
        self._durations: deque[float] = deque(maxlen=REMEMBERED)

    def seen(self, records: Sequence[StepRecord], now: float) -> None:
        """Steps were taken."""
        self._since, self._told, self._step = now, False, records[-1].step
        durations = (record.duration_seconds for record in records)
        self._durations.extend(seconds for seconds in durations if math.isfinite(seconds))

    def look(self, now: float) -> Anomaly | None:
        """What is to be said of the silence until now; None where that is nothing new."""
        passed = now - self._since
        if self._config is None or self._told or passed < self._limit(self._config):
            return None
        self._told = True
        if self._step is None:
            said = (
                f"no step in the {passed:.0f} s since the watch began: is step() of the watched "
                "optimizer called?"
            )
        else:
            usual = statistics.median(self._durations) if self._durations else math.nan
            said = (
                f"no step in {passed:.0f} s since step {self._step}, where one takes {usual:.3g} s"
            )
        return Anomaly(
            kind="stuck", level="warning", step=self._step or 0, value=passed,
            expected=self._limit(self._config), message=f"stuck: {said}",
        )  # fmt: skip

    def _limit(self, config: Stuck) -> float:
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(config.seconds, config.times * usual)
