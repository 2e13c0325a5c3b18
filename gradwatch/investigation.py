"""A step that is not finite, before its update: what went bad first, put on a card at once.

    look (the gradients are still there)  ->  conclude (the row is written): culprit, card

On the training thread, so that a crash right behind it leaves both. On a healthy step all of this
is one comparison.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gradwatch.backend import Backend
from gradwatch.due_step import DueStep
from gradwatch.policy import Detect, Policy
from gradwatch.recorder import Recorder
from gradwatch.recording.cards import HISTORY, card_of
from gradwatch.records import Culprit, RunInfo
from gradwatch.rules.culprit import Clues, of_step
from gradwatch.rules.culprit_gradients import ModuleGradient, modules_of
from gradwatch.rules.culprit_ranks import RankWord, of_ranks
from gradwatch.rules.detect_nonfinite import finding_of, is_overflow
from gradwatch.rules.guard import Verdict
from gradwatch.rules.reading import Reading

__all__ = ["MOST_IN_A_ROW", "Investigation"]

MOST_IN_A_ROW = 10
"""Steps that are not finite, one behind the other, that are looked into."""

REFILL = 0.1
"""Of one more, for each step that is finite: looking costs up to a forward pass."""

KEPT_BATCHES = 64


class Investigation:
    """One run's; a failure of its own is counted and costs nothing else."""

    def __init__(
        self, info: RunInfo, detect: Detect, recorder: Recorder, on_error: Callable[[str], None]
    ) -> None:
        self._info = info
        self._is_on = detect.nonfinite is not None
        self._how = detect.culprit
        self._recorder = recorder
        self._on_error = on_error
        self._names = [parameter.name for parameter in info.layout.parameters]
        self._credit = float(MOST_IN_A_ROW)
        self._found: Culprit | None = None
        self._step = -1
        self._batches: deque[tuple[str, int]] = deque(maxlen=KEPT_BATCHES)
        """Hashes of bad batches, each with its step."""

    def change(self, policy: Policy) -> None:
        """Goes on under a policy with other numbers, which the cards tell."""
        self._info = replace(self._info, policy_sha256=policy.sha256)

    def look(
        self, backend: Backend, step: DueStep, reading: Reading, verdict: Verdict, *, is_over: bool
    ) -> None:
        """A step was judged.

        Args:
            is_over: whether its update was made meanwhile.
        """
        self._found, self._step = None, step.number
        if math.isfinite(reading.total_norm) and np.isfinite(reading.norms_Q).all():
            self._credit = min(MOST_IN_A_ROW, self._credit + REFILL)
            self._guarded(lambda: backend.was_finite(step.seen))
            return
        scale = reading.loss_scale
        scale = scale if math.isfinite(scale) else step.context.loss_scale
        if not self._is_on or is_overflow(verdict.skip, scale, step.loss):
            return
        if self._credit < 1.0:
            return
        self._credit -= 1.0
        if self._how == "none":
            self._found = Culprit(message="not looked for (detect.culprit: none)")
            return
        try:
            clues = backend.clues(step.seen, is_over=is_over)
            # A finite one says nothing of those that were not logged.
            is_known = step.is_loss_whole or not math.isfinite(step.loss or 0.0)
            loss = step.loss if is_known else None
            found = of_step(clues, self._gradients(step, reading, clues), loss)
            found = self._with_batch(found, clues.batch, step.number)
            self._found = self._conferred(found, backend, step, clues)
        except Exception:
            self._on_error("detection")
            self._found = Culprit(message="not determined: looking for it failed, see the log")

    def _conferred(self, found: Culprit, backend: Backend, step: DueStep, clues: Clues) -> Culprit:
        """What all processes together make of it."""
        word = RankWord(found, step.loss, clues.own_is_bad)
        heard = backend.confer(step.number, word.to_bytes())
        if not heard:
            return found
        words = [None if one is None else RankWord.from_bytes(one) for one in heard]
        return of_ranks(words, self._info.rank)

    def conclude(self) -> None:
        """The row of the step is written: its card is, too."""
        found, self._found = self._found, None
        if found is None:
            return
        try:
            records = self._recorder.newest(HISTORY)
            if not records or records[-1].step != self._step:
                return  # the row could not be written
            record = replace(records[-1], culprit=found)
            finding = finding_of(record, "alert", self._info.is_shadow)
            card = card_of(self._info, finding, [*records[:-1], record], found)
            self._recorder.investigated(record.step, found, card)
        except Exception:
            self._on_error("recording")

    def _guarded(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:
            self._on_error("detection")

    def _gradients(
        self, step: DueStep, reading: Reading, clues: Clues
    ) -> tuple[ModuleGradient, ...]:
        count = len(self._names)
        present_P = np.frombuffer(step.present, dtype=np.bool_)
        finite_P = np.ones(len(present_P), dtype=np.bool_)
        finite_P[present_P] = np.isfinite(reading.norms_Q)
        finite = finite_P[:count].tolist()
        placed = [i for i in clues.order if i < count and present_P[i]]
        if not set(np.flatnonzero(~finite_P)) <= set(placed):
            placed = []
        return modules_of(self._names, finite, placed)

    def _with_batch(self, found: Culprit, batch: str, step: int) -> Culprit:
        if not batch:
            return found
        same = tuple(earlier for known, earlier in self._batches if known == batch)
        self._batches.append((batch, step))
        return replace(found, batch=batch, same_batch=same)
