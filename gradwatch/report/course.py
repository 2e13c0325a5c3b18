"""A card in, what its numbers tell of how it came about: since when, how wide, what came before.

Only what was recorded is told, and only its order in time: a learning rate that rose in the step
before, never that it is to blame.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradwatch.recording.cards import Card
from gradwatch.rules.detect_regime import JUMP

__all__ = [
    "RISEN",
    "SAME",
    "Rise",
    "first_step",
    "num_hit",
    "rise_before",
    "steps_clipped",
    "usual",
    "what_is_hit",
]

RISEN = 1.3
"""Times its median before that a loss must be to have risen."""

SAME = 1.02
"""Times its median before up to which a loss is the same."""

FEWEST = 5
"""Values that a median is made of."""

OF_PARAMETERS = ("collapsed", "unused")
"""Kinds that look at single parameters."""

SINCE = re.compile(r" since step (\d+)")
OF_ALL = re.compile(r"\w+: (?:all )?(\d+)(?: of \d+)? layers hold ")


@dataclass(frozen=True, slots=True)
class Rise:
    """A learning rate that went up by more than a baseline takes for the same."""

    step: int
    """The first one that was taken with it."""

    before: float
    after: float

    @property
    def times(self) -> float:
        return self.after / self.before


def first_step(card: Card) -> int:
    """Of the abnormal steps that led to the finding, as the detector counts them."""
    said = SINCE.findall(card.message)
    return min(int(said[-1]), card.step) if said else card.step


def num_hit(card: Card) -> int:
    """How many layers, or parameters, a finding is of; 0 where it is of none in particular."""
    if card.layer is not None:
        more = re.search(rf"layer {re.escape(card.layer)} and (\d+) more: ", card.message)
        if more is not None:
            return 1 + int(more[1])
    of_all = OF_ALL.match(card.message)
    return int(of_all[1]) if of_all is not None else len(card.layers)


def what_is_hit(card: Card) -> str:
    return "parameters" if card.kind in OF_PARAMETERS else "layers"


def usual(card: Card, values: Sequence[float]) -> float:
    """Median of one number over the steps before the first abnormal one; NaN where few are known.

    Args:
        values: of the steps of the card.
    """
    num_before = sum(step < first_step(card) for step in card.steps)
    before = [value for value in values[:num_before] if math.isfinite(value)]
    return statistics.median(before) if len(before) >= FEWEST else math.nan


def rise_before(card: Card) -> Rise | None:
    """The largest rise of the learning rate before the first abnormal step, of the steps that the
    card holds: an update that was made with it had part in what came then."""
    rates, first = card.series.get("learning_rate", ()), first_step(card)
    rises = [
        Rise(step, before, after)
        for step, (before, after) in zip(card.steps[1:], pairwise(rates), strict=False)
        if step < first and 0 < before < math.inf and JUMP * before < after < math.inf
    ]
    return max(rises, key=lambda rise: rise.times, default=None)


def steps_clipped(card: Card) -> list[int]:
    """The steps from the first abnormal one to that of the card whose gradient was made smaller."""
    norms = (card.series.get(name, ()) for name in ("total_norm", "total_norm_clipped"))
    return [
        step
        for step, before, after in zip(card.steps, *norms, strict=False)
        if step >= first_step(card) and after < before
    ]
