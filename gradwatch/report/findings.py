"""Anomalies and cards in, the findings of a run out: each episode once, oldest first.

The same list, in the same order, for every page, file and terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch.policy import KINDS
from gradwatch.recording.cards import Card
from gradwatch.records import Anomaly, Level
from gradwatch.report.card import begun_first, found
from gradwatch.report.kinds import MEANS, name_of

__all__ = ["ORDER", "Finding", "Listed", "findings_of", "listed", "most_urgent", "urgency"]

ORDER = "oldest first"
"""As a heading says it."""

EVENTS_NAMED = 5
"""Of each kind, the first ones."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A warning or an alert, with what is said of it in a line."""

    step: int
    kind: str
    level: Level
    layer: str | None
    message: str
    card: Card | None

    more: Sequence[int] = ()
    """Further bad steps of its episode that have cards of their own."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """As many findings as there is room for: how it began, and the newest ones."""

    first: Sequence[Finding]
    left_out: int
    """Between the two."""

    newest: Sequence[Finding]
    events: Sequence[Anomaly]
    """Of one step each, which are not listed."""

    @property
    def said_of_events(self) -> str:
        """`2 events of one step each, none an alert: spike (...) at step 301, 356`; empty where
        there are none."""
        if not self.events:
            return ""
        kinds = dict.fromkeys(one.kind for one in self.events)
        said = []
        for kind in kinds:
            steps = [one.step for one in self.events if one.kind == kind]
            named = ", ".join(map(str, steps[:EVENTS_NAMED]))
            more = f" and {len(steps) - EVENTS_NAMED} more" if len(steps) > EVENTS_NAMED else ""
            means = f" ({MEANS[kind]})" if kind in MEANS else ""
            said.append(f"{name_of(kind)}{means} at step {named}{more}")
        number = len(self.events)
        count = "1 event of one step" if number == 1 else f"{number} events of one step each"
        return f"{count}, none an alert: {'; '.join(said)}"

    @property
    def all(self) -> list[Finding]:
        return [*self.first, *self.newest]


def listed(anomalies: Sequence[Anomaly], cards: Sequence[Card], most: int) -> Listed:
    every = findings_of(anomalies, cards)
    events = [one for one in anomalies if one.level == "event"]
    if len(every) <= most:
        return Listed(first=every, left_out=0, newest=(), events=events)
    newest = every[len(every) - most + 1 :] if most > 1 else []
    return Listed(
        first=every[:1], left_out=len(every) - 1 - len(newest), newest=newest, events=events
    )


def most_urgent(findings: Sequence[Finding], most: int) -> list[Finding]:
    """Those of the highest level, and of them the latest; in the order that they came in."""
    order = sorted(
        range(len(findings)),
        key=lambda place: (findings[place].level != "alert", -findings[place].step, place),
    )
    return [findings[place] for place in sorted(order[:most])]


def findings_of(anomalies: Sequence[Anomaly], cards: Sequence[Card]) -> list[Finding]:
    """By step, and within a step the most urgent first; a card that was written before a crash may
    have no anomaly."""
    begun = {(one.step, one.kind): one for one in anomalies if one.level != "event"}
    card_of = {(card.step, card.kind): card for card in reversed(cards)}
    more: dict[tuple[int, str], list[int]] = {place: [] for place in begun}
    newest: dict[str, tuple[int, str]] = {}
    for place in sorted(begun.keys() | card_of.keys()):
        step, kind = place
        if place in begun or kind not in newest:
            newest[kind] = place
            more.setdefault(place, [])
        else:
            more[newest[kind]].append(step)
    order = sorted(more, key=lambda place: (place[0], urgency(place[1])))
    return [_finding(begun.get(place), card_of.get(place), more[place]) for place in order]


def _finding(anomaly: Anomaly | None, card: Card | None, more: Sequence[int]) -> Finding:
    known = anomaly or card
    assert known is not None
    message = known.message.removeprefix(f"{known.kind}: ")
    message = begun_first(message) if card is None else found(card)
    return Finding(
        step=known.step, kind=known.kind, level=known.level, layer=known.layer,
        message=message, card=card, more=more,
    )  # fmt: skip


def urgency(kind: str) -> int:
    """What sorts kinds of findings, the most urgent first."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS)
