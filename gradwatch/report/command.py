"""`gradwatch report`: what a recording has to tell, printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradwatch.errors import RecordingError
from gradwatch.recording.cards import Card
from gradwatch.recording.reader import Recording, open_recording
from gradwatch.report.card import card_lines, labelled, printable
from gradwatch.report.findings import ORDER, Listed, findings_of, listed
from gradwatch.report.standing import Standing

__all__ = ["print_report"]

WIDTH = 100
MOST_LISTED = 20
MOST_NAMED = 5


def print_report(recording: Path, *, last_anomaly: bool, step: int | None) -> None:
    """What went wrong in a run, for a terminal; of a finding or a step the whole card.

    Args:
        last_anomaly: the last alert; of a run without one, its last warning.

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
        every = findings_of(recording.anomalies(), cards)
        cards = [one.card for one in every if one.card is not None]
        if not cards:
            yield f"run {printable(recording.info.run)}: no warning and no alert"
            return
        last = _last_of_highest(cards)
        yield from card_lines(last, WIDTH, len(recording.layers))
        if others := _named([one for one in cards if one.step >= last.step and one is not last]):
            yield from labelled("also", others, WIDTH)
        return
    else:
        yield from _overview(recording)
        return
    for number, card in enumerate(chosen):
        yield from [""] * bool(number)
        yield from card_lines(card, WIDTH, len(recording.layers))


def _last_of_highest(cards: Sequence[Card]) -> Card:
    """The last alert; of a run without one, the last warning. Of those of one step the most urgent.

    Args:
        cards: in the order of findings, at least one.
    """
    highest = [card for card in cards if card.level == "alert"] or cards
    return next(card for card in highest if card.step == highest[-1].step)


def _named(cards: Sequence[Card]) -> str:
    """`diverging (--step 349), stuck (--step 420)`"""
    named = [f"{printable(card.kind)} (--step {card.step})" for card in cards[:MOST_NAMED]]
    more = len(cards) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _overview(recording: Recording) -> Iterator[str]:
    stands = Standing(recording.path).look()
    info, known, verdict = stands.info, stands.known, stands.verdict
    reached = f"step {known.step}" if known.step is not None else "no step yet"
    yield f"run {printable(info.run)}, rank {info.rank}: {stands.state}, {reached}, " + (
        f"{len(recording.layers)} layers"
    )
    yield from labelled("verdict:", verdict.headline, WIDTH)
    for label, text in verdict.lines:
        yield from labelled(label, text, WIDTH)
    yield from labelled("when", stands.span, WIDTH)
    yield from _findings(listed(known.anomalies, known.cards, MOST_LISTED))
    if known.cards:
        highest = "alert" if any(card.level == "alert" for card in known.cards) else "warning"
        yield f"--last-anomaly prints the card of the last {highest}, --step N that of another step"


def _findings(findings: Listed) -> Iterator[str]:
    events = findings.said_of_events
    if not findings.all:
        if events:
            yield from labelled("findings", f"none but {events}", WIDTH)
        return
    yield f"findings, {ORDER}:"
    for place, one in enumerate(findings.all):
        if findings.left_out and place == len(findings.first):
            yield f"  ... {findings.left_out} more ..."
        more = len(one.more)
        steps = f" (and {more} more step{'s' * (more != 1)}, to {one.more[-1]})" if more else ""
        yield from textwrap.wrap(
            f"step {one.step}  {one.level} {one.kind}: {printable(one.message, 400)}{steps}",
            WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False,
        )  # fmt: skip
    yield from textwrap.wrap(events, WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
