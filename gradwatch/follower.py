"""One recording in, its tally out: what the run's own endpoint shows, from what it wrote.

    rows -> Tally, and Detection for what is open now
    what only the ring holds -> the same, once it is overdue or its writer is dead

Anomalies are those that were recorded. Records that never got as far as the recording are judged
here: the detectors are pure, so they find what the run would have found.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from gradwatch.errors import PolicyError, RecordingError
from gradwatch.policy import load_policy, parse_policy
from gradwatch.recording.tail import Tail
from gradwatch.recording.writer import writer_lives
from gradwatch.records import Anomaly, RunInfo, StepRecord
from gradwatch.rules.detection import KINDS, Detection
from gradwatch.tally import STATES, Tally

__all__ = ["Follower", "checked"]

OPEN_SECONDS = 1.0
"""After which a run's own consumer looks at a record that the next step has not closed."""

UNSTORED_SECONDS = 2.0
"""After which a closed record is taken from the ring: the run's disk may be full."""

JUDGED, WARMED_UP, MOST_JUDGED = 2_000, 1_000, 20_000
"""Records that detection sees of a recording that is there already: the newest, and those from
before its last alert on, so that an episode that is open still is found open."""

REMEMBERED = 1024

Key = tuple[int, float]


class Follower:
    """Reads on whenever `look` is called. Used by one thread at a time."""

    def __init__(
        self,
        tail: Tail,
        *,
        recent: bool = False,
        lives: Callable[[RunInfo], bool | None] = writer_lives,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            recent: count only what is judged too: for those who ask what is open now.
            lives: whether the process that writes is there; None where nobody knows.

        Raises:
            RecordingError: the recording cannot be read.
        """
        self.info = checked(tail.path, tail.info)
        self.tally = Tally(self.info, kinds=KINDS)
        self.tally.set_status(None)
        self.caught_up = False
        """Whether everything that was there has been counted once."""

        self.ended = False
        """Whether no more records will come."""

        self.state = "running"
        self.alive: bool | None = None
        """Whether its process was there at the last look; None where nobody knows."""

        self.calm_since: int | None = None
        """The first step in which no alert was open any more; None while one is, or none was."""

        self.unjudged = ""
        """Why `anomaly_active` is not known."""

        self._tail = tail
        self._lives = lives
        self._clock = clock
        self._detection: Detection | None = None
        self.open_since: dict[str, int] = {}
        """The step in which each open alert began, as far as was judged."""

        self._active: Mapping[str, tuple[str, ...]] = {}
        self._begin_policy(self.info.policy)
        newest, alert = tail.landmarks()
        first = min(newest - JUDGED, alert - WARMED_UP if alert else newest)
        self._judged_from = max(first, newest - MOST_JUDGED)
        if recent:
            tail.skip_to(self._judged_from)
        self._policies: list[tuple[int, str]] = []
        self._handled: deque[Key] = deque(maxlen=REMEMBERED)
        self._early: dict[Key, tuple[Anomaly, ...]] = {}
        """What was taken from the ring and found there, until its row comes."""

        self._begun = self._seen_begun = 0
        self._moved = self._gained = clock()

    def look(self, most: int) -> None:
        """Counts what has come since the last call.

        Args:
            most: how many rows at a time; where there are more, `caught_up` stays false.

        Raises:
            RecordingError: it cannot be read further.
        """
        if self.ended:
            return
        # Asked first: what a process wrote before it was seen dead is all that it wrote.
        self.alive = self._lives(self.info)
        dead = self.alive is False
        gained = self._tail.read(most)
        self._policies += gained.policies
        for row, record in gained.records:
            self._take_row(row, record)
        for finding in gained.findings:
            self.tally.note(finding)
        if gained.records:
            self._gained = self._clock()
            self.tally.set_recording_bytes(gained.num_bytes)
        self.tally.set_status(gained.status)
        if gained.more:
            return
        over = gained.state != "running"
        self._look_into_ring(everything=dead or over)
        self._set_state("crashed" if dead and not over else gained.state)
        self.ended = dead or over
        self.caught_up = True

    def _set_state(self, state: str) -> None:
        if state not in STATES:
            raise RecordingError(f"{self._tail.path}: expected a state of {STATES}. Got: {state!r}")
        self.state = state
        self.tally.set_state(state)

    def _take_row(self, row: int, record: StepRecord) -> None:
        key = _key(record)
        if key not in self._early:
            self._begin_policies(record.step)
            if row > self._judged_from:
                self._judge(record)
            self._count(record)
            return
        if record.samples:  # the ring has none
            self._judge(record, samples_only=True)
            self._note_active(record.step)
        found = {(anomaly.kind, anomaly.level) for anomaly in self._early.pop(key)}
        for anomaly in record.anomalies:
            if (anomaly.kind, anomaly.level) not in found:
                self.tally.note(anomaly)
        if self._handled and self._handled[-1] == key:
            self.tally.amend(record)

    def _look_into_ring(self, *, everything: bool) -> None:
        begun, now = self._tail.records_begun(), self._clock()
        if begun is None:
            return
        if begun != self._begun:
            self._begun, self._moved = begun, now
        late = now - self._moved >= OPEN_SECONDS
        if not everything and (begun == self._seen_begun or not (late or self._unstored(now))):
            return
        records = self._tail.in_ring()
        if late or everything:
            self._seen_begun = begun
        else:
            del records[-1:]  # what is logged for it may still come
        known = set(self._handled)
        unknown = [i for i, record in enumerate(records) if _key(record) not in known]
        for record in (records[i] for i in unknown):
            self._take_early(record)

    def _unstored(self, now: float) -> bool:
        return now - self._gained >= UNSTORED_SECONDS

    def _take_early(self, record: StepRecord) -> None:
        self._begin_policies(record.step)
        anomalies = self._judge(record)
        self._early[_key(record)] = anomalies
        while len(self._early) > REMEMBERED:
            del self._early[next(iter(self._early))]
        self._count(replace(record, anomalies=anomalies))

    def _count(self, record: StepRecord) -> None:
        self.tally.add(record)
        self._handled.append(_key(record))
        self._note_active(record.step)

    def _note_active(self, step: int) -> None:
        if self._detection is not None:
            active = self._detection.active()
            if active != self._active:
                self.calm_since = None if active else step
                self.open_since = {k: self.open_since.get(k, step) for k in active}
                self._active = active
                self.tally.set_active(active)

    def _judge(self, record: StepRecord, *, samples_only: bool = False) -> tuple[Anomaly, ...]:
        if (detection := self._detection) is None:
            return ()
        try:
            return detection.observe_samples(record) if samples_only else detection.observe(record)
        except Exception as error:  # as in the run itself, where this is counted and survived
            self.unjudged = f"detection failed at step {record.step}: {error}"
            return ()

    def _begin_policies(self, step: int) -> None:
        while self._policies and self._policies[0][0] <= step:
            _, text = self._policies.pop(0)
            self._begin_policy(text)

    def _begin_policy(self, text: str) -> None:
        """The policy from here on; one that cannot be read ends detection."""
        try:
            policy = load_policy(parse_policy(text, "<recorded>") if text else None)
        except PolicyError as error:
            self.unjudged = f"its policy cannot be read: {error}"
            self._detection = None
            self.tally.set_active({})
            return
        if self._detection is None:
            self._detection = Detection(
                self.info.layout, policy.detect, is_shadow=self.info.is_shadow
            )
        else:
            self._detection = self._detection.reconfigured(policy.detect)
        info = replace(self.info, policy=text, policy_sha256=policy.sha256)
        self.tally.set_info(info if text else self.info)


def _key(record: StepRecord) -> Key:
    return record.step, record.time


def checked(path: Path, info: RunInfo) -> RunInfo:
    """
    Raises:
        RecordingError: what is shown of every run is not what it should be.
    """
    words: tuple[object, ...] = (
        info.run, info.mode, info.policy, info.policy_sha256, info.framework, info.model,
        info.version, info.host, info.device, info.process_table,
    )  # fmt: skip
    if (
        all(isinstance(word, str) for word in words)
        and all(isinstance(number, int) for number in (info.rank, info.pid))
        and isinstance(info.started, (int, float))
    ):
        return info
    raise RecordingError(f"{path}: the description of the run is damaged")
