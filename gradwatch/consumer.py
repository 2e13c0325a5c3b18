"""Records in, everything slow out: detection, metrics, recording and callbacks on one thread.

    ring.take -> detection -> tally -> store -> callbacks

Each of them may break without the others, and none reaches the training thread. It is woken ten
times a second rather than at each step, since every wake takes the interpreter from the trainer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from gradwatch.cards import cards_of
from gradwatch.errors import RecordingError
from gradwatch.policy import Detect, Policy
from gradwatch.recording.cards import Card
from gradwatch.recording.ring import Ring
from gradwatch.recording.store import Store
from gradwatch.records import POLICY, SAMPLES, Anomaly, Culprit, Float32s, Status, StepRecord
from gradwatch.reloading import Change
from gradwatch.rules.detect_silence import Silence
from gradwatch.rules.detection import Detection
from gradwatch.saying import say
from gradwatch.tally import Tally
from gradwatch.urgency import Urgency

__all__ = ["Consumer"]

Found = TypeVar("Found")

WAKE_SECONDS = 0.1
OPEN_SECONDS = 1.0
"""After which a record is looked at that the next step has not closed."""

URGENT_SECONDS = 0.02
"""... or after this time at most where it is urgent: what is logged behind a step comes at once."""

URGENT_WAKE_SECONDS = 0.002

KEPT = 256
"""Finished records that stay at hand for `watch.history`."""


class Consumer:
    """Owns the thread. `start` once, `flush` at any time, `stop` once."""

    def __init__(
        self,
        ring: Ring,
        *,
        detection: Detection,
        detect: Detect,
        tally: Tally,
        store: Store | None,
        report: Callable[[str], None],
    ) -> None:
        self.callbacks: list[Callable[[Anomaly], None]] = []
        self._ring = ring
        self.samples: deque[tuple[int, Float32s]] = deque()
        """What was sampled, by step; the recorder's."""

        self.local_norms: deque[tuple[int, float]] = deque()
        """Of this process alone, by step; the recorder's."""

        self.culprits: deque[tuple[int, Culprit]] = deque()
        """What was found before an update, by step; the recorder's."""

        self.cards: deque[Card] = deque()
        """What the training thread could not write; the recorder's."""

        self.order: Callable[[], Sequence[int]] = tuple
        """Parameters in the order of a backward pass."""

        self.loss_before: Callable[[], bool] = bool
        """Whether the loss is logged before the step."""

        self.active_elsewhere: Callable[[], Mapping[str, tuple[str, ...]]] = dict
        """As `open_anomalies`, of what is not found in records."""

        self.unhealthy = -1
        """The last step that found an alert open."""

        self.detection = detection
        self._detect = detect
        self._silence = Silence(detect.stuck, time.monotonic())
        self.stop_run: Callable[[], Callable[[Anomaly], None] | None] = lambda: None
        """A reference to what stops the run after a finding; it may be gone."""

        self._tally = tally
        self._store = store
        self._report = report
        self.unstored = 0
        """Records that the store refused."""

        self._finished: deque[StepRecord] = deque(maxlen=KEPT)
        self._wakeup = threading.Event()
        self._stopping = False
        self._final_state = "finished"
        self.ended = False
        """Whether everything was handled and the recording closed."""

        self.changes: deque[Change] = deque()
        """What became of a policy file, to be told with the first record that it holds for."""

        self.chores: list[Callable[[], None]] = []
        """Run at each wake."""

        self._status_noted: Status | None = None
        self._early: StepRecord | None = None
        """The open record, handled before its time."""

        self._open_since = (-1, 0.0)
        self.urgency = Urgency(self.wake)
        self.rest_seconds = WAKE_SECONDS
        """Until it looks without being woken. A look that finds nothing costs thirty times what it
        does: the trainer has filled the caches with its own."""

        self._handling = threading.RLock()  # a callback may save the state
        self._idle = threading.Condition()
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="gradwatch-consumer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wakeup.set()

    def flush(self, timeout: float) -> bool:
        """Waits until every closed record was handled; False where that took too long."""
        if threading.current_thread() is self._thread:
            return True  # a callback cannot wait for itself
        if not self._thread.is_alive():
            return self.ended
        with self._idle:
            target = self._rounds + 2
            return self._idle.wait_for(self._reached(target), timeout)

    def _reached(self, target: int) -> Callable[[], bool]:
        """A round that began after the call must end; waking until then."""

        def reached() -> bool:
            self._wakeup.set()
            return self._rounds >= target

        return reached

    def stop(self, state: str, timeout: float) -> None:
        """Handles what is left, notes how the run ended, and ends the thread."""
        self._final_state = state
        self._stopping = True
        self._wakeup.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No record is handled meanwhile."""
        with self._handling:
            yield

    def finished(self) -> dict[int, StepRecord]:
        """The newest handled records with their anomalies, by step."""
        return {record.step: record for record in tuple(self._finished)}

    def open_anomalies(self) -> dict[str, tuple[str, ...]]:
        """Kinds with an open alert, each with its layers."""
        return self.detection.active() | dict(self.active_elsewhere())

    def _run(self) -> None:
        while True:
            stopping = self._stopping
            for chore in () if stopping else self.chores:
                self._guarded("readback", chore)
            with self._handling:
                self._guarded("readback", self._round)
            self._guarded("recording", self._note_status)
            with self._idle:
                self._rounds += 1
                self._idle.notify_all()
            if stopping:
                self._guarded("recording", self._end)
                return
            self._wakeup.wait(URGENT_WAKE_SECONDS if self._is_urgent() else self.rest_seconds)
            self._wakeup.clear()

    def _end(self) -> None:
        self._tally.set_state(self._final_state)
        if self._store is not None:
            self._store.note_state(self._final_state)
            self._store.close()
        self.ended = True

    def _note_status(self) -> None:
        status = self._tally.status()
        if self._store is None or status == self._status_noted:
            return
        # Counting this failure would change the status, and fail again for ever.
        with suppress(RecordingError):
            self._store.note_status(status)
            self._status_noted = status

    def _round(self) -> None:
        early, records = self._early, self._ring.take()
        if records:
            self._early = None  # closed since, or overwritten
        if early is not None and records and _same(records[0], early):
            records[0], late = self._amended(early, records[0])
            past = list(self._finished)[:-1]
            self._finished[-1] = records[0]
            new = [self._handled(record) for record in records[1:]]
            records[1:] = new
            told = [replace(records[0], anomalies=late), *new]
        else:
            records = new = told = [self._handled(record) for record in records]
            past = list(self._finished)
        self._finished.extend(new)
        if records:
            self._guarded("recording", self._stored, records)
            self._silence.seen(records, time.monotonic())
        elif (overdue := self._overdue()) is not None:
            self._early = self._handled(overdue)
            self._finished.append(self._early)
            new = told = [self._early]
        self._guarded("recording", self._write_cards, past, told)
        active = self.open_anomalies()
        self.urgency.learn(new, is_calm=not active)
        self._guarded("export", self._tally.set_active, active)
        dropped = self._ring.dropped + self.unstored
        self._guarded("export", self._tally.set_records_dropped, dropped)
        for record in told:
            for anomaly in record.anomalies:
                self._announce(anomaly)
        if not new and (stuck := self._silence.look(time.monotonic())) is not None:
            self.found(stuck)

    def found(self, anomaly: Anomaly) -> None:
        """A finding that comes without a record."""
        self._guarded("export", self._tally.note, anomaly)
        if self._store is not None:
            self._guarded("recording", self._store.add_anomaly, anomaly)
        self._announce(anomaly)

    def _write_cards(self, past: list[StepRecord], new: Sequence[StepRecord]) -> None:
        if self._store is None:
            return
        while self.cards:
            self._store.add_card(self.cards[0])
            self.cards.popleft()
        for record in new:
            if record.anomalies:
                cards = cards_of(
                    self._tally.info, record, [one for one in past if one.step < record.step],
                    self.order, loss_before=self.loss_before(),
                )  # fmt: skip
                for card in cards:
                    self._store.add_card(card)
            past.append(record)

    def _overdue(self) -> StepRecord | None:
        """The open record, once, where the next step is long in coming: it may be bad news."""
        step = self._ring.open_step()
        now = time.monotonic()
        if step is None or self._early is not None:
            return None
        if self._open_since[0] != step:
            self._open_since = (step, now)
        age = now - self._open_since[1]
        if age < OPEN_SECONDS and not self._is_urgent():
            return None
        newest = self._ring.peek(1)
        if not newest or newest[0].step != step:
            return None
        is_whole = (
            not self._finished or newest[0].scalars.keys() >= self._finished[-1].scalars.keys()
        )
        return newest[0] if is_whole or age >= URGENT_SECONDS else None

    def _is_urgent(self) -> bool:
        """Whether the open record is to be looked at, and was not yet."""
        return self._early is None and self._ring.open_step() == self.urgency.step

    def _handled(self, record: StepRecord) -> StepRecord:
        record = self._diagnosed(self._completed(record))
        if self.open_anomalies():
            self.unhealthy = record.step
        self._guarded("export", self._tally.add, record)
        return record

    def _amended(
        self, early: StepRecord, closed: StepRecord
    ) -> tuple[StepRecord, tuple[Anomaly, ...]]:
        """The record of a step that was handled while it was open, and what is found only now."""
        closed = self._completed(closed)
        late: tuple[Anomaly, ...] = ()
        if closed.samples and not early.samples:
            try:
                late = self.detection.observe_samples(closed)
            except Exception:
                self._report("detection")
        record = replace(
            closed, anomalies=(*early.anomalies, *late), culprit=early.culprit or closed.culprit,
            samples=early.samples or closed.samples,
            local_norm=closed.local_norm if math.isnan(early.local_norm) else early.local_norm,
        )  # fmt: skip
        if self.open_anomalies():
            self.unhealthy = record.step
        self._guarded("export", self._tally.amend, record)
        for anomaly in late:
            self._guarded("export", self._tally.note, anomaly)
        return record, late

    def _completed(self, record: StepRecord) -> StepRecord:
        """With what was found out about its step by now."""
        sampled, culprit = _of(record, self.samples), _of(record, self.culprits)
        if (local_norm := _of(record, self.local_norms)) is not None:
            record = replace(record, local_norm=local_norm)
        if sampled is not None and record.skipped is None:
            record = replace(record, samples=dict(zip(SAMPLES, sampled, strict=True)))
        return record if culprit is None else replace(record, culprit=culprit)

    def _diagnosed(self, record: StepRecord) -> StepRecord:
        anomalies: tuple[Anomaly, ...] = ()
        while self.changes and self.changes[0].step <= record.step:
            change = self.changes.popleft()
            anomalies = (*anomalies, change.event(record.step))
            if change.policy is not None:
                self._guarded("detection", self._reconfigure, change.policy)
                self._guarded("recording", self._note_policy, change.step, change.policy)
        try:
            anomalies = (*anomalies, *self.detection.observe(record))
        except Exception:
            self._report("detection")
        return replace(record, anomalies=anomalies) if anomalies else record

    def _reconfigure(self, policy: Policy) -> None:
        self._detect = policy.detect
        self.detection = self.detection.reconfigured(policy.detect)

    def _note_policy(self, step: int, policy: Policy) -> None:
        info = replace(
            self._tally.info, policy=policy.canonical_yaml(), policy_sha256=policy.sha256
        )
        self._tally.set_info(info)
        if self._store is not None:
            self._store.note_policy(step, info.policy)

    def _stored(self, records: list[StepRecord]) -> None:
        if self._store is None:
            return
        try:
            self._store.add(records)
        except Exception:
            self.unstored += len(records)
            raise
        self._tally.set_recording_bytes(self._store.bytes)

    def _announce(self, anomaly: Anomaly) -> None:
        by_hand = anomaly.kind == POLICY  # who has written the file is to see what came of it
        then = "warn" if by_hand else self._then(anomaly.kind)
        quiet = then == "record" or (anomaly.level == "event" and not by_hand)
        level = logging.INFO if quiet else logging.WARNING
        say(level, "step %d: %s", anomaly.step, anomaly.message)
        if then == "stop" and (stop := self.stop_run()) is not None:
            stop(anomaly)
        for callback in self.callbacks:
            self._guarded("callback", callback, anomaly)

    def _then(self, kind: str) -> str:
        detector = self._detect[kind]
        return "record" if detector is None else detector.then

    def _guarded(self, component: str, call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except BaseException:  # sys.exit in a callback is not the end of this thread
            self._report(component)


def _of(record: StepRecord, found: deque[tuple[int, Found]]) -> Found | None:
    """What was found in its step; what is of earlier ones is left behind."""
    while found and found[0][0] <= record.step:
        step, one = found.popleft()
        if step == record.step:
            return one
    return None


def _same(record: StepRecord, other: StepRecord) -> bool:
    return (record.step, record.time) == (other.step, other.time)
