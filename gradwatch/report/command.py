"""`gradwatch report`: what a recording has to tell, printed."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradwatch.errors import RecordingError
from gradwatch.recording.cards import Card
from gradwatch.recording.reader import Recording, open_recording
from gradwatch.records import Anomaly
from gradwatch.report.card import card_lines, headline, labelled, printable
from gradwatch.report.standing import Standing
from gradwatch.report.verdict import urgency

__all__ = ["print_report"]

WIDTH = 100
MOST_LISTED = 20


def print_report(recording: Path, *, last_anomaly: bool, step: int | None) -> None:
    """What went wrong in a run, for a terminal; of the last finding or of a step the whole card.

    Raises:
        RecordingError: it cannot be read, or has no card of that step.
    """
    with open_recording(recording) as opened:
        lines = list(_lines(opened, last_anomaly, step))
    for line in lines:
        print(line)


def _lines(recording: Recording, last_anomaly: bool, step: int | None) -> Iterator[str]:
    cards = recording.cards()
    if step is not None:
        chosen = [card for card in cards if card.step == step]
        if not chosen:
            known = ", ".join(str(card.step) for card in cards[-MOST_LISTED:]) or "none"
            raise RecordingError(f"{recording.path}: no card of step {step}. There are: {known}")
    elif last_anomaly:
        cards = [card for card, _ in _episodes(cards, recording.anomalies())]
        at_last = [card for card in cards if card.step == cards[-1].step]
        chosen = sorted(at_last, key=lambda card: urgency(card.kind))[:1]
        if not chosen:
            yield f"run {printable(recording.info.run)}: no warning and no alert"
            return
    else:
        yield from _overview(recording)
        return
    for number, card in enumerate(chosen):
        yield from [""] * bool(number)
        yield from card_lines(card, WIDTH)
    if len(others := {card.kind for card in cards if card.step == chosen[0].step}) > len(chosen):
        more = ", ".join(sorted(others - {card.kind for card in chosen}))
        yield from labelled("also", f"{more} (--step {chosen[0].step})", WIDTH)


def _overview(recording: Recording) -> Iterator[str]:
    cards, info = recording.cards(), recording.info
    steps = recording.last(1)
    reached = f"step {steps[-1].step}" if steps else "no step yet"
    yield f"run {printable(info.run)}, rank {info.rank}: {recording.state}, {reached}, " + (
        f"{len(recording.layers)} layers"
    )
    levels = Counter(anomaly.level for anomaly in recording.anomalies())
    said = [
        f"{levels[level]} {level}{'s' * (levels[level] != 1)}"
        for level in ("alert", "warning", "event")
    ]
    verdict = Standing(recording.path).look().verdict
    yield f"verdict: {verdict.headline} ({', '.join(said)})"
    for label, text in verdict.lines:
        yield from labelled(label, text, WIDTH)
    episodes = _episodes(cards, recording.anomalies())
    if len(episodes) > MOST_LISTED:
        yield f"the last {MOST_LISTED} of {len(episodes)} findings:"
    for card, more in episodes[-MOST_LISTED:]:
        what = "" if card.culprit is None else f": {printable(card.culprit.message, 400)}"
        if more:
            what += f" (and {len(more)} more step{'s' * (len(more) != 1)}, to {more[-1].step})"
        yield from textwrap.wrap(
            f"{headline(card)}{what}", WIDTH, initial_indent="  ", subsequent_indent=" " * 6,
            break_on_hyphens=False,
        )  # fmt: skip
    if cards:
        yield "--last-anomaly prints the whole card, --step N that of another step"


def _episodes(cards: Sequence[Card], anomalies: Sequence[Anomaly]) -> list[tuple[Card, list[Card]]]:
    """Each bad step of an episode has a card; the first one tells how it began."""
    begun = {(anomaly.kind, anomaly.step) for anomaly in anomalies}
    episodes: list[tuple[Card, list[Card]]] = []
    newest: dict[str, list[Card]] = {}
    for card in cards:
        if (card.kind, card.step) in begun or card.kind not in newest:
            newest[card.kind] = []
            episodes.append((card, newest[card.kind]))
        else:
            newest[card.kind].append(card)
    return episodes
