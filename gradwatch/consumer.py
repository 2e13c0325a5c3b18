"""Records in, everything slow out: detection, metrics, recording and callbacks on one thread.

    ring.take -> detection -> tally -> store -> callbacks

Each of them may break without the others, and none reaches the training thread. It is woken ten
times a second rather than at each step, since every wake takes the interpreter from the trainer.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gradwatch.recording.ring import Ring
from gradwatch.recording.store import Store
from gradwatch.records import Anomaly, StepRecord
from gradwatch.rules.detection import Detection
from gradwatch.tally import Tally

__all__ = ["Consumer", "Reporter"]

logger = logging.getLogger("gradwatch")

WAKE_SECONDS = 0.1
KEPT = 256
"""Finished records that stay at hand for `watch.history`."""


class Reporter:
    """Counts the errors of gradwatch itself and logs each kind once."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._logged: set[tuple[str, str]] = set()

    def __call__(self, component: str) -> None:
        """Called where an exception is handled; its traceback is logged the first time."""
        self._tally.hook_error(component)
        error = sys.exc_info()[1]
        kind = (component, type(error).__name__)
        if kind in self._logged:
            return
        self._logged.add(kind)
        logger.error(
            "gradwatch failed to do its %s (%s: %s); training goes on, and further failures of "
            "this kind are counted in gradwatch_hook_errors_total only",
            component, type(error).__name__, error, exc_info=error,
        )  # fmt: skip


class Consumer:
    """Owns the thread. `start` once, `flush` at any time, `stop` once."""

    def __init__(
        self,
        ring: Ring,
        *,
        detection: Detection,
        tally: Tally,
        store: Store | None,
        report: Callable[[str], None],
    ) -> None:
        self.callbacks: list[Callable[[Anomaly], None]] = []
        self._ring = ring
        self._detection = detection
        self._tally = tally
        self._store = store
        self._report = report
        self.unstored = 0
        """Records that the store refused."""

        self._finished: deque[StepRecord] = deque(maxlen=KEPT)
        self._wakeup = threading.Event()
        self._stopping = False
        self._final_state = "finished"
        self._idle = threading.Condition()
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="gradwatch-consumer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wakeup.set()

    def flush(self, timeout: float) -> bool:
        """Waits until every closed record was handled; False where that took too long."""
        if not self._thread.is_alive():
            return False
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

    def finished(self) -> dict[int, StepRecord]:
        """The newest handled records with their anomalies, by step."""
        return {record.step: record for record in tuple(self._finished)}

    def open_anomalies(self) -> dict[str, tuple[str, ...]]:
        """Kinds with an open alert, each with its layers."""
        return self._detection.active()

    def _run(self) -> None:
        while True:
            stopping = self._stopping
            self._guarded("readback", self._round)
            with self._idle:
                self._rounds += 1
                self._idle.notify_all()
            if stopping:
                self._guarded("recording", self._end)
                return
            self._wakeup.wait(WAKE_SECONDS)
            self._wakeup.clear()

    def _end(self) -> None:
        self._tally.set_state(self._final_state)
        if self._store is not None:
            self._store.note_state(self._final_state)
            self._store.close()

    def _round(self) -> None:
        records = [self._diagnosed(record) for record in self._ring.take()]
        self._finished.extend(records)
        for record in records:
            self._guarded("export", self._tally.add, record)
        self._guarded("export", self._tally.set_active, self._detection.active())
        if records:
            self._guarded("recording", self._stored, records)
        dropped = self._ring.dropped + self.unstored
        self._guarded("export", self._tally.set_records_dropped, dropped)
        for record in records:
            for anomaly in record.anomalies:
                self._announce(anomaly)

    def _diagnosed(self, record: StepRecord) -> StepRecord:
        try:
            anomalies = self._detection.observe(record)
        except Exception:
            self._report("detection")
            return record
        return replace(record, anomalies=anomalies) if anomalies else record

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
        log = logger.info if anomaly.level == "event" else logger.warning
        log("step %d: %s", anomaly.step, anomaly.message)
        for callback in self.callbacks:
            self._guarded("callback", callback, anomaly)

    def _guarded(self, component: str, call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except Exception:
            self._report(component)
