"""Followed runs, and which of them are shown: one for each name and rank."""

from __future__ import annotations

import time
from collections.abc import Iterable

from gradwatch.export.renderer import Renderer
from gradwatch.export.series import clean
from gradwatch.follower import Follower
from gradwatch.recording.finding import Candidate
from gradwatch.recording.tail import Tail

__all__ = ["Run", "chosen"]

LAST_WORD_SECONDS = 60.0
"""How long a run that has ended is shown before another one of its name, unless it was scraped."""

AGAIN_SECONDS = 5.0
"""Between two attempts to read a recording that could not be read."""


class Run:
    """A recording that is followed, and what became of that."""

    def __init__(self, candidate: Candidate, tail: Tail) -> None:
        """
        Raises:
            RecordingError: the recording cannot be read.
        """
        self.candidate = candidate
        self.path = candidate.path
        self.identity = candidate.identity
        self.written = candidate.written
        self._follower = Follower(tail)
        self.tally = self._follower.tally
        self.renderer = Renderer(self.tally.info)
        self.name = (clean(self.tally.info.run), self.tally.info.rank)
        self.started = self.tally.info.started
        self.looked = float("-inf")
        self.trouble = ""
        """Why it could not be read further."""

        self.troubles: set[str] = set()
        """What was told of already."""

        self.ended_at: float | None = None
        """When its end was noticed, or was written where that was before."""

        self.was_shown = False
        """Whether its end was scraped, or is none of the time that it was followed."""

    @property
    def caught_up(self) -> bool:
        return self._follower.caught_up

    @property
    def ended(self) -> bool:
        return self._follower.ended

    @property
    def state(self) -> str:
        return self._follower.state

    @property
    def unjudged(self) -> str:
        return self._follower.unjudged

    def look(self, most: int, now: float) -> None:
        """Reads on; see Follower.look."""
        if self.trouble and time.monotonic() - self.looked < AGAIN_SECONDS:
            return
        seen_before = self.caught_up
        self._follower.look(most)
        self.trouble = ""
        if self.ended and self.ended_at is None:
            self.ended_at = now if seen_before else min(now, self.written)
            self.was_shown = not seen_before

    @property
    def silent_since(self) -> float | None:
        """Since when nothing will come, or nothing has come where nobody knows whether it will."""
        if self.ended:
            return self.ended_at
        return None if self._follower.alive and not self.trouble else self.written


def chosen(runs: Iterable[Run], now: float) -> list[Run]:
    """Those that are shown: the newest of each name and rank, but the last word of one that has
    ended before what comes after it."""
    by_name: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.caught_up:
            by_name.setdefault(run.name, []).append(run)
    return [_one_of(same, now) for same in by_name.values()]


def _one_of(same: list[Run], now: float) -> Run:
    ordered = sorted(same, key=lambda run: (run.started, str(run.path)))
    for run in ordered[:-1]:
        waits = run.ended and not run.was_shown
        if waits and now - (run.ended_at or now) < LAST_WORD_SECONDS:
            return run
    return ordered[-1]
