"""When this run was scraped, and whether it is worth waiting for once more.

A run that ends between two scrapes takes its last state with it: its final counters, and that it
finished. So a run that was scraped waits for one more, and one that was not does not.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from itertools import pairwise

__all__ = ["Scrapes"]

REMEMBERED = 9
PATIENCE = 2.5
"""Scrape intervals that may pass without one until the scraper is thought gone."""

SLOWEST_SECONDS = 60.0
"""Interval that is assumed of a scraper that came only once."""


class Scrapes:
    """Remembers the last scrapes; times are of the monotonic clock."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=REMEMBERED)
        self._changed = threading.Condition()

    def note(self, started: float) -> None:
        """A scrape that began at `started` was answered to its last byte."""
        with self._changed:
            self._starts.append(started)
            self._changed.notify_all()

    @property
    def interval(self) -> float | None:
        """Median seconds between scrapes; None with fewer than two."""
        starts = tuple(self._starts)
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        return statistics.median(gaps) if gaps else None

    def wait_for_one_more(self, seconds: float) -> bool:
        """Waits for a scrape that begins from now on; whether it came.

        Args:
            seconds: at most; less where scrapes come often, and 0 where none came or none has
                come for long.
        """
        now = time.monotonic()
        with self._changed:
            patience = min(seconds, self._patience(now))
            return self._changed.wait_for(lambda: self._newest() >= now, max(patience, 0.0))

    def _patience(self, now: float) -> float:
        interval = self.interval
        if interval is None:
            gone, patience = SLOWEST_SECONDS, SLOWEST_SECONDS
        else:
            gone = patience = PATIENCE * interval
        return patience if now - self._newest() <= gone else 0.0

    def _newest(self) -> float:
        return self._starts[-1] if self._starts else float("-inf")
