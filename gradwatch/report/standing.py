"""A recording in, how its run stands out: state, findings, open alerts, verdict; no norms.

Cheap enough to be asked of every run in a list, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradwatch.follower import Follower, checked
from gradwatch.recording.cards import Card
from gradwatch.recording.reader import Recording
from gradwatch.recording.tail import Tail
from gradwatch.recording.writer import writer_lives
from gradwatch.records import Anomaly, RunInfo, StepRecord
from gradwatch.report.aftermath import BEFORE, MOST, Aftermath, Course
from gradwatch.report.course import first_step
from gradwatch.report.moments import utc
from gradwatch.report.verdict import Known, Verdict, verdict

__all__ = ["RECENT", "Standing", "Stands"]

RECENT = 50
"""Steps that the share of clipped ones is of."""

CHUNK = 2000


@dataclass(frozen=True, kw_only=True)
class Stands:
    """How a run stands at one moment."""

    info: RunInfo
    known: Known
    verdict: Verdict
    latest: StepRecord | None
    clipped: float
    """Share of the last steps; NaN before the first."""

    policies: Sequence[tuple[int, str]]
    """Those that took the place of the first one, each with its first step."""

    @property
    def state(self) -> str:
        return self.known.state

    @property
    def span(self) -> str:
        """From when to when it went."""
        last = self.known.last_time
        end = f", last step at {utc(last)}" if math.isfinite(last) else ""
        return f"started {utc(self.info.started)}{end}"

    @property
    def policy(self) -> str:
        """In force, as YAML; empty without one."""
        return self.policies[-1][1] if self.policies else self.info.policy


class Standing:
    """Remembers what it read, so that the next look is quick. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._follower: Follower | None = None
        self._times: dict[int, float] = {}
        self._course: Course | None = None
        self._course_of: tuple[int, str] | None = None

    def look(self) -> Stands:
        """
        Raises:
            RecordingError: it is not a recording, or cannot be read.
        """
        with Recording(self.path) as recording:
            info, state = checked(self.path, recording.info), recording.state
            anomalies, cards = recording.anomalies(), recording.cards()
            recent, policies = recording.last(RECENT), recording.policies()
            self._note_times(recording, cards)
        if state == "running" and writer_lives(info) is False:
            state = "crashed"
        open_alerts = self._open(anomalies, cards, state)
        latest = recent[-1] if recent else None
        durations = [one.duration_seconds for one in recent if one.duration_seconds > 0]
        known = Known(
            state=state,
            step=None if latest is None else latest.step,
            latest=latest,
            num_layers=len(info.layout.layers),
            times=dict(self._times),
            last_time=math.nan if latest is None else latest.time,
            step_seconds=float(np.median(durations)) if durations else math.nan,
            anomalies=anomalies,
            cards=cards,
            open=open_alerts,
            open_since={} if self._follower is None else dict(self._follower.open_since),
            calm_since=None if self._follower is None else self._follower.calm_since,
        )
        if (card := verdict(known).card) is not None:
            known = replace(known, after=self._after(card, info, known, recent))
        return Stands(
            info=info,
            known=known,
            verdict=verdict(known),
            latest=latest,
            clipped=float(np.mean([one.clipped for one in recent])) if recent else math.nan,
            policies=policies,
        )

    def _after(
        self, card: Card, info: RunInfo, known: Known, recent: Sequence[StepRecord]
    ) -> Aftermath | None:
        """How it went on since the card that the verdict tells of; only new records are read."""
        with Recording(self.path) as recording:
            first = first_step(card)
            if self._course is None or self._course_of != (card.step, card.kind):
                before = recording.records(max(0, first - BEFORE), first)
                self._course, self._course_of = Course(card, info.layout, before), (
                    card.step, card.kind,
                )  # fmt: skip
            course, newest = self._course, known.step
            assert newest is not None
            # What is logged for the newest step of a live run may still come.
            end = min(newest + (known.state != "running"), first + MOST)
            if course.next < end:
                for record in recording.records(course.next, end):
                    course.take(record)
        return course.so_far(recent)

    def _note_times(self, recording: Recording, cards: Sequence[Card]) -> None:
        """Of the steps in which alerts began; their cards know that of the finding."""
        for card in cards:
            first = first_step(card)
            if card.level == "alert" and first != card.step and first not in self._times:
                for record in recording.records(first, first + 1):
                    self._times[first] = record.time

    def _open(
        self, anomalies: Sequence[Anomaly], cards: Sequence[Card], state: str
    ) -> Mapping[str, Sequence[str]] | None:
        """Alerts whose episode has not ended, as the detectors find it over the last records."""
        levels = {*(one.level for one in anomalies), *(card.level for card in cards)}
        if "alert" not in levels and state != "crashed":
            return {}
        if self._follower is None:
            self._follower = Follower(Tail(self.path), recent=True)
        follower = self._follower
        while not follower.ended:
            follower.look(CHUNK)
            if follower.caught_up:
                break
        return None if follower.unjudged else dict(follower.tally.snapshot().active)
