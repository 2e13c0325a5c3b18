"""When this run was scraped, and whether it is worth waiting for once more.

A run that ends between two scrapes takes its last state with it: its final counters, and that it
finished. So a run that was scraped waits for one more, and one that was not does not.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from itertools import pairwise

from gradwatch.saying import say

__all__ = ["Scrapes"]

REMEMBERED = 9
PATIENCE = 2.5
"""Scrape intervals that may pass without one until the scraper is thought gone."""

QUIET_SECONDS = 3.0
"""Waiting for longer is said."""

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

    def came_since(self, moment: float) -> bool:
        """Whether a scrape that began after this moment was answered."""
        return self._newest() >= moment

    def wait_for_one_more(self, seconds: float, *, even_for_the_first: bool = False) -> bool:
        """Waits for a scrape that begins from now on; whether it came.

        Args:
            seconds: at most; less where scrapes come often, and 0 where none has come for long.
            even_for_the_first: wait where none came yet, too.
        """
        now = time.monotonic()
        with self._changed:
            patience = seconds
            if self._starts or not even_for_the_first:
                patience = max(min(seconds, self._patience(now)), 0.0)
            if self._wait_since(now, min(patience, QUIET_SECONDS)) or patience <= QUIET_SECONDS:
                return self.came_since(now)
            say(
                logging.WARNING,
                "gradwatch waits for one last scrape of its metrics, %.0f s more at most; Ctrl-C "
                "ends the wait, linger=0 does without",
                patience - QUIET_SECONDS,
            )
            return self._wait_since(now, patience - QUIET_SECONDS)

    def _wait_since(self, moment: float, seconds: float) -> bool:
        return self._changed.wait_for(lambda: self.came_since(moment), seconds)

    def _patience(self, now: float) -> float:
        interval = self.interval
        if interval is None:
            gone, patience = SLOWEST_SECONDS, SLOWEST_SECONDS
        else:
            gone = patience = PATIENCE * interval
        return patience if now - self._newest() <= gone else 0.0

    def _newest(self) -> float:
        return self._starts[-1] if self._starts else float("-inf")
