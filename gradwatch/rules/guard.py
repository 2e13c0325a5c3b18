"""What a step deserves, on the host: apply, skip or stop.

guard, rules, over_K, total_norm, history  ->  Verdict, history
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradwatch.policy import Guard
from gradwatch.rules.clipping import Rule

__all__ = ["NONFINITE", "OVERFLOW", "SkipHistory", "Verdict", "judge", "was_dropped"]

NONFINITE = "nonfinite"
OVERFLOW = "overflow"
"""The reason of a step that a loss scaler dropped, not we."""


@dataclass(frozen=True, slots=True)
class SkipHistory:
    """The skips that still count."""

    in_a_row: int = 0
    recent: tuple[int, ...] = ()
    """Steps of the skips within the budget's span, oldest first."""

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "recent": list(self.recent)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> SkipHistory:
        return cls(int(state["in_a_row"]), tuple(int(step) for step in state["recent"]))


@dataclass(frozen=True, slots=True)
class Verdict:
    skip: str | None = None
    """Why the step is dropped: `overflow`, `nonfinite` or the name of a rule; None takes it."""

    stop: str | None = None
    """Why to end the run before the update, as a sentence; None goes on."""


def judge(
    guard: Guard,
    rules: Sequence[Rule],
    over: Sequence[bool],
    total_norm: float,
    history: SkipHistory,
    step: int,
    *,
    overflow: bool = False,
) -> tuple[Verdict, SkipHistory]:
    """The guard comes first, then the rules from top to bottom; the first reason is the reason.

    Args:
        overflow: whether a loss scaler drops the step, whatever is said here; patience and budget
            count it like any other skip.
    """
    skip = stop = None
    if overflow:
        skip = OVERFLOW
    elif guard.nonfinite in ("skip", "stop") and not math.isfinite(total_norm):
        skip = NONFINITE
        if guard.nonfinite == "stop":
            stop = f"the gradient is not finite (total norm {total_norm})"
    for rule, is_over in zip(rules, () if overflow else over, strict=not overflow):
        if is_over and rule.then in ("skip", "stop"):
            skip = skip or rule.name
            if rule.then == "stop":
                stop = stop or f"rule {rule.name} is over its limit (total norm {total_norm:.4g})"
    if skip is None:
        return Verdict(), (replace(history, in_a_row=0) if history.in_a_row else history)
    history = _counted(history, step, span=guard.budget.steps if guard.budget else 0)
    return Verdict(skip, stop or _spent(guard, history)), history


def _counted(history: SkipHistory, step: int, span: int) -> SkipHistory:
    recent = tuple(s for s in (*history.recent, step) if s > step - span)
    return SkipHistory(in_a_row=history.in_a_row + 1, recent=recent)


def _spent(guard: Guard, history: SkipHistory) -> str | None:
    """Patience and budget are what is tolerated; one skip more is too many."""
    if guard.patience is not None and history.in_a_row > guard.patience:
        return f"{history.in_a_row} steps skipped in a row, guard.patience is {guard.patience}"
    if guard.budget and len(history.recent) > guard.budget.skips:
        skips, span = len(history.recent), guard.budget.steps
        return f"{skips} of the last {span} steps skipped, guard.budget is {guard.budget.skips}"
    return None


def was_dropped(skipped: str | None, is_applied: bool) -> bool:
    """Whether a recorded skip has kept a step from being taken.

    Args:
        skipped: its reason, None of a step that was taken.
        is_applied: whether the policy's decisions are; a loss scaler's always are.
    """
    return skipped is not None and (is_applied or skipped == OVERFLOW)
