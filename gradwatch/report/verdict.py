"""What is known of a run in, the answer to "is it healthy?" out: since when not, where, what was
done, what to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gradwatch.recording.cards import Card
from gradwatch.records import Anomaly, StepRecord
from gradwatch.report.advice import OTHERWISE
from gradwatch.report.aftermath import FAR, NEAR, Aftermath
from gradwatch.report.blinding import BLINDING, blinding
from gradwatch.report.card import printable, told, what_came_before, widest
from gradwatch.report.course import RISEN, first_step, num_hit, usual
from gradwatch.report.findings import urgency
from gradwatch.report.kinds import name_of
from gradwatch.report.moments import duration, utc

__all__ = ["Health", "Known", "Verdict", "verdict"]

Health = Literal["healthy", "over", "warning", "alert", "unknown"]
"""`over`: there were alerts, and none is open any more."""

SILENT_SECONDS, SILENT_STEPS = 60.0, 20.0
"""A run without a step for so long, and for so many of its usual steps, is said to be silent."""

NAMED = 3
"""Layers that are named."""

JUST_BEFORE = 50
"""Steps between an alert and an end that it is named with."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a verdict is made of."""

    state: str
    """`running`, `finished`, `stopped` or `crashed`."""

    step: int | None
    """The last one; None before the first."""

    last_time: float = math.nan
    """Of that step, in Unix time."""

    step_seconds: float = math.nan
    """How long a step takes."""

    latest: StepRecord | None = None
    """Of that step."""

    num_layers: int = 0
    """Of the model; 0 where that is not known."""

    times: Mapping[int, float] = field(default_factory=dict)
    """Unix time of the steps in which what is found began, as far as they are known."""

    anomalies: Sequence[Anomaly] = ()
    cards: Sequence[Card] = ()
    open: Mapping[str, Sequence[str]] | None = None
    """Kinds of alert whose episode is open, with their layers; None while that is not known."""

    open_since: Mapping[str, int] = field(default_factory=dict)
    """By open kind, the step in which it began, as far as is known."""

    calm_since: int | None = None
    """The first step in which no alert was open any more, where that was seen."""

    after: Aftermath | None = None
    """How it went on since the card of the verdict."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    health: Health
    headline: str
    """One line: whether it is healthy, since when not, what and where."""

    lines: Sequence[tuple[str, str]] = ()
    """Labels and sentences: where it began, what was done, what to do."""

    card: Card | None = None
    """What to look at first."""


def verdict(known: Known, now: float | None = None) -> Verdict:
    """
    Args:
        now: in Unix time.
    """
    blind = blinding(known.anomalies, known.latest, known.after)
    said = _verdict(known, time.time() if now is None else now, blind)
    if blind is None or (said.card is not None and said.card.kind == BLINDING):
        return said
    first = f"first {OTHERWISE[BLINDING]} (found at step {blind.step})"
    lines = [
        (label, f"{first}; then {text}" if label == "to do" else text) for label, text in said.lines
    ]
    return replace(said, lines=lines)


def _verdict(known: Known, now: float, blind: Anomaly | None) -> Verdict:
    alerts = _alerts(known)
    if known.step is None:
        return Verdict(health="unknown", headline=f"No step yet; the run is {known.state}")
    latest = max((step for step, _ in alerts), default=None)
    ended = known.state in ("crashed", "stopped")
    if latest is not None and (
        known.open is None or known.open or (ended and known.step - latest <= JUST_BEFORE)
    ):
        return _not_healthy(known, alerts, now)
    if ended:
        before = "no alert came before"
        if latest is not None:
            kinds = ", ".join(name_of(kind) for step, kind in alerts if step == latest)
            before = f"{_count(len(alerts), 'alert')} before, the last at step {latest} ({kinds})"
        how, to_do = "Crashed", "read the log of the run: what ended it is not in its gradients"
        if known.state == "stopped":
            how = "Stopped, by its policy or by hand,"
            to_do = "nothing, where that was meant; else read the log of the run"
        return Verdict(
            health="warning",
            headline=f"{how} at step {known.step:,}; {before}",
            lines=[("to do", to_do)],
        )
    silent = now - known.last_time
    usual = max(SILENT_SECONDS, SILENT_STEPS * (known.step_seconds or 0))
    if known.state == "running" and silent > usual:
        return Verdict(
            health="warning",
            headline=f"No step for {duration(silent)}, the last one was {known.step}",
            lines=[("to do", "see whether the process hangs: evaluation, a checkpoint, the loader, "
                    "or a rank that others wait for")],
        )  # fmt: skip
    if latest is not None:
        return _over(known, alerts)
    warnings = [one for one in known.anomalies if one.level == "warning"]
    if warnings:
        last = blind or warnings[-1]
        card = _card_at(known, last.step, last.kind)
        if blind is not None:
            first = last.step if card is None else first_step(card)
            headline = (
                f"No alert up to step {known.step:,}, but an explosion would not show: since step "
                f"{first} something clips the gradient before it is measured"
            )
        else:
            headline = (
                f"Healthy up to step {known.step:,}, with {_count(len(warnings), 'warning')}; "
                f"the last: {name_of(last.kind)}{_in(last.layer)} at step {last.step}"
            )
        return Verdict(
            health="warning" if blind is not None else "healthy",
            headline=headline,
            lines=_lines(known, card),
            card=card,
        )
    return Verdict(
        health="healthy",
        headline=f"Healthy: no alert and no warning up to step {known.step:,}",
        lines=[("to do", "nothing"), *_now(known, None)],
    )


def _not_healthy(known: Known, alerts: Sequence[tuple[int, str]], now: float) -> Verdict:
    kinds = set(known.open) if known.open else {kind for _, kind in alerts}
    begun = {kind: since for kind in kinds if (since := _since(known, alerts, kind)) is not None}
    if not begun:
        begun = {kind: step for step, kind in alerts[-1:]}
    cards = {kind: _card_at(known, step, kind) for kind, step in begun.items()}
    kind = min(begun, key=lambda kind: _order(kind, begun[kind], cards[kind]))
    card = cards[kind]
    others = sorted(set(begun) - {kind}, key=urgency)
    first = begun[kind] if card is None else first_step(card)
    when = _time_of(known, first, card)
    ago = f", {duration(now - when)} ago" if known.state == "running" else ""
    moment = f" ({utc(when)}{ago})" if math.isfinite(when) else ""
    also = f"; also {', '.join(map(name_of, others))}" if others else ""
    also += _in_all(known, alerts, 1 + len(others))
    end = "" if known.state == "running" else f"; the run {known.state} at step {known.step}"
    if known.state == "finished":
        end = f"; not over at its end, step {known.step}"
    layer = next(iter((known.open or {}).get(kind, ())), None)
    if card is not None and (back := _not_fully(known, card)):
        return Verdict(
            health="warning",
            headline=f"{back}: exploded at step {first}{moment} {_told_shortly(known, card, '')}"
            f"{also}",
            lines=_lines(known, card),
            card=card,
        )
    what = f"{name_of(kind)}{_in(layer)}" if card is None else _told_shortly(known, card)
    return Verdict(
        health="alert",
        headline=f"Not healthy since step {first}{moment}: {what}{also}{end}",
        lines=_lines(known, card),
        card=card,
    )


def _lines(known: Known, card: Card | None) -> list[tuple[str, str]]:
    return [*([] if card is None else told(card, known.after)), *_now(known, card)]


def _not_fully(known: Known, card: Card) -> str:
    """What is to be said of an explosion that is over for most layers, while its alert is open:
    the detector waits until each layer has been near its median for some steps."""
    after, ended = known.after, known.state in ("crashed", "stopped")
    if card.kind != "exploding" or set(known.open or ()) != {"exploding"} or ended:
        return ""
    before = math.nan if card is None else usual(card, card.series.get("total_norm", ()))
    if after is None or not after.layers_now or not after.norm_now <= NEAR * before:
        return ""
    up = after.still_up
    if 2 * len(up) >= len(after.layers_now) or len(up) >= max(num_hit(card), 1):
        return ""
    if not up:
        return "Recovered, its alert not closed yet"
    worst = f"{printable(up[0])} still {after.layers_now[up[0]]:.3g}x its median"
    return f"Not fully recovered, {worst}"


def _in_all(known: Known, alerts: Sequence[tuple[int, str]], named: int) -> str:
    """How many findings there are, where they are more than those that are named."""
    warnings = sum(one.level == "warning" for one in known.anomalies)
    if len(alerts) <= named:
        return ""
    said = [_count(number, noun) for number, noun in
            ((len(alerts), "alert"), (warnings, "warning")) if number]  # fmt: skip
    return f"; {', '.join(said)} in all"


def _order(kind: str, step: int, card: Card | None) -> tuple[int, bool, int]:
    """What began first, of that what says where, of that the most urgent."""
    first = step if card is None else first_step(card)
    return first, card is None or not num_hit(card), urgency(kind)


def _told_shortly(known: Known, card: Card, kind: str | None = None) -> str:
    """`exploding in all 5 layers, 1 step after the learning rate rose 100x`."""
    where = widest(card, known.num_layers)
    kind = name_of(card.kind) if kind is None else kind
    what = f"{kind}{f' in {where}' if where else ''}".strip()
    return ", ".join([*([what] if what else []), *what_came_before(card)])


def _time_of(known: Known, step: int, card: Card | None) -> float:
    """Of a step; of the finding where the step is not there any more."""
    return known.times.get(step, math.nan if card is None else card.time)


def _now(known: Known, card: Card | None) -> list[tuple[str, str]]:
    """How it stands by now, beside how it was before the steps of the card."""
    latest, after = known.latest, known.after
    if latest is None or (card is not None and latest.step <= card.step):
        return []
    where, loss, norm = f"at step {latest.step}", latest.scalars.get("loss", math.nan), math.nan
    if after is None or math.isnan(after.norm_now):
        norm = latest.total_norm
    else:
        where = f"medians of the last {after.num_recent} steps, to {after.step}"
        loss, norm = after.loss_now, after.norm_now
    series = {} if card is None else card.series
    said = []
    for name, course, value in (
        ("loss", series.get("loss", ()), loss),
        ("total norm", series.get("total_norm", ()), norm),
        ("learning rate", series.get("learning_rate", ()), latest.learning_rate),
    ):
        before = math.nan if card is None else usual(card, course)
        if not math.isnan(value):
            was = "" if math.isnan(before) else f" ({before:.3g} before)"
            said.append(f"{name} {value:.3g}{was}")
    more = [] if card is None or after is None else _stands_out(known, card, after)
    return [("now", f"{where}: {'; '.join([', '.join(said), *more])}")]


def _stands_out(known: Known, card: Card, after: Aftermath) -> list[str]:
    """What an open alert is open by, and since when the run as a whole is back."""
    said = []
    if card.kind == "exploding" and after.layers_now:
        up = after.still_up
        named = ", ".join(
            f"{printable(layer)} {after.layers_now[layer]:.3g}x" for layer in up[:NAMED]
        )
        more = f" and {len(up) - NAMED} more" if len(up) > NAMED else ""
        said.append(
            f"above {NEAR:g}x their median: {named}{more}" if up
            else f"no layer above {NEAR:g}x its median"
        )  # fmt: skip
    if after.good_since is not None and card.kind in ("exploding", "loss_spike"):
        said.append(f"total norm below {FAR:g}x since step {after.good_since}")
    if known.open is not None and known.open:
        kinds = sorted(known.open, key=urgency)
        said.append(
            f"open: {', '.join(f'{name_of(kind)}{_in_some(known.open[kind])}' for kind in kinds)}"
        )
    elif known.calm_since is not None and after.good_since not in (None, known.calm_since):
        said.append(f"last alert closed at step {known.calm_since}")
    return said


def _since(known: Known, alerts: Sequence[tuple[int, str]], kind: str) -> int | None:
    """The finding that an open episode began with: layers that come back are told of, too."""
    steps = [step for step, one in alerts if one == kind]
    within = [step for step in steps if step >= known.open_since.get(kind, math.inf)]
    return min(within, default=max(steps, default=None))


def _over(known: Known, alerts: Sequence[tuple[int, str]]) -> Verdict:
    # Of alerts that came close behind each other the first one tells how it began.
    step, kind = alerts[-1]
    for earlier, other in reversed(alerts[:-1]):
        if step - earlier > JUST_BEFORE:
            break
        step, kind = earlier, other
    card = _card_at(known, step, kind)
    after = known.after
    first = step if card is None else first_step(card)
    when = _time_of(known, first, card)
    moment = f" ({utc(when)})" if math.isfinite(when) else ""
    good = _good_since(known, alerts, card)
    since = f" since step {good}" if good is not None else ""
    warnings = sum(one.level == "warning" for one in known.anomalies)
    count = _count(len(alerts), "alert")
    count += f" and {_count(warnings, 'warning')}" if warnings else ""
    which = "; see " if len(alerts) > 1 else ": "
    what = name_of(kind) if card is None else _told_shortly(known, card)
    at = f"at step {first}"
    skipped = "; it was skipped" if card is not None and card.was_dropped else ""
    if after is not None and kind == "nonfinite":
        at += " alone" if after.num_nonfinite == 1 else ""
        if after.nonfinite_steps:
            at = f"in {after.nonfinite_steps}"
            is_all = after.num_skipped == after.num_nonfinite
            if skipped:
                skipped = f"; {'all' if is_all else after.num_skipped} of them were skipped"
    before = math.nan if card is None else usual(card, card.series.get("loss", ()))
    loss = math.nan if after is None else after.loss_now
    is_up = loss > RISEN * before
    again = f"Healthy again{since}"
    if is_up:
        again = f"Loss still up, {loss:.3g} ({before:.3g} before); no alert open"
        again += f" since step {known.calm_since}" if known.calm_since is not None else ""
    return Verdict(
        health="warning" if is_up else "over",
        headline=f"{again}, after {count}{which}{what}, {at}{moment}{skipped}",
        lines=_lines(known, card),
        card=card,
    )


def _good_since(known: Known, alerts: Sequence[tuple[int, str]], card: Card | None) -> int | None:
    """The first step from which on the numbers were as before; where these do not tell, that in
    which the last alert was closed."""
    good = None if known.after is None else known.after.good_since
    tells = card is not None and card.kind in ("nonfinite", "exploding")
    if tells and good is not None and all(step < good for step, _ in alerts):
        return good
    return known.calm_since


def _alerts(known: Known) -> list[tuple[int, str]]:
    """Steps and kinds; a card may be there before its anomaly is."""
    found = {(one.step, one.kind) for one in known.anomalies if one.level == "alert"}
    newest = max((one.step for one in known.anomalies), default=-1)
    found |= {
        (card.step, card.kind)
        for card in known.cards
        if card.level == "alert" and card.step > newest
    }
    return sorted(found, key=lambda one: (one[0], urgency(one[1])))


def _card_at(known: Known, step: int, kind: str) -> Card | None:
    cards = [card for card in known.cards if card.step == step]
    return next((card for card in cards if card.kind == kind), None)


def _in(layer: str | None) -> str:
    return f" in {printable(layer)}" if layer else ""


def _in_some(layers: Sequence[str]) -> str:
    named = ", ".join(printable(layer) for layer in layers[:NAMED])
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f" in {named}{more}" if layers else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
