"""A card in, what to do about it out, by what went bad first and how it went on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.recording.cards import Card
from gradwatch.records import Origin
from gradwatch.report.course import RISEN, first_step, rise_before, usual

__all__ = ["Later", "to_do"]

LATENCY = 5
"""Steps that it may have lasted when it is found."""

TO_DO: dict[Origin, str] = {
    "input": "look at the batch and at how it was read and normalised; training itself is fine",
    "weight": "go back to {checkpoint}: no later step mends these weights. Look for the first step "
    "of this recording that was not finite",
    "forward": "look in that module for a division, a logarithm, a root or an exponential of "
    "what it was given, and for float16 that overflows (bfloat16 does not)",
    "loss": "look at the targets of the batch and at the loss function: a logarithm of 0, a "
    "division by a count of 0, labels out of range",
    "gradient": "look there for a function whose slope is infinite (a root or a norm at 0), and "
    "for float16 that overflows on the way back",
}
OTHERWISE = {
    "diverging": "go back to the last healthy checkpoint and lower the learning rate",
    "rank_divergence": "go back to {checkpoint}: since then the ranks train different models. Look "
    "for memory errors and for code that one rank alone runs",
    "rank_outlier": "compare the data, the seed and the hardware of that rank with the others",
    "vanishing": "look at what changed at step {first}; if it has been so from the start, at "
    "initialisation, normalisation and skip connections before that layer",
    "collapsed": "look at what changed at step {first}: something that is cut off, frozen or "
    "skipped, or a loss of another scale",
    "dead": "look at what changed at step {first}; units that no input wakes any more do not come "
    "back: go back to {checkpoint}",
    "loss_scale_collapse": "look for what is not finite at any scale: see the card before this one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """How the run stands since the card was written."""

    step: int
    loss: float
    """Median of the last ones; NaN where none was logged."""

    calm_since: int | None = None
    """The first step in which no alert was open any more."""


def to_do(card: Card, later: Later | None = None) -> str:
    """A sentence or two.

    Args:
        later: None where all that is known is the card.
    """
    rise = rise_before(card)
    bad_from = max(0, card.step - LATENCY) if rise is None else rise.step
    checkpoint = f"a checkpoint from before step {bad_from}"
    origin = None if card.culprit is None else card.culprit.origin
    if card.kind in ("exploding", "loss_spike"):
        said = _by_the_loss(card, later)
    elif card.kind in OTHERWISE:
        said = OTHERWISE[card.kind]
    elif origin is not None:
        said = TO_DO[origin]
    elif card.kind == "nonfinite":
        said = _after_a_nonfinite_step(card, later)
    else:
        said = f"see what docs/detectors.md says of {card.kind}"
    if rise is not None:
        said = (
            f"find what set the learning rate to {rise.after:.3g} in step {rise.step} "
            f"({rise.before:.3g} before). {said[0].upper()}{said[1:]}"
        )
    return said.format(checkpoint=checkpoint, first=first_step(card))


def _after_a_nonfinite_step(card: Card, later: Later | None) -> str:
    replay = "set detect.culprit: replay in the policy to be told where it began the next time"
    if not card.skipped:
        return f"where the loss is not finite, go back to {{checkpoint}}; {replay}"
    over = later is not None and later.calm_since is not None
    alone = "" if over else " if it is this step alone"
    return f"nothing urgent{alone}. Look at the batch of step {card.step}; {replay}"


def _by_the_loss(card: Card, later: Later | None) -> str:
    """By what the loss has done in the abnormal steps of the card, and since."""
    losses = card.series.get("loss", ())
    before = usual(card, losses)
    within = [
        loss
        for step, loss in zip(card.steps, losses, strict=False)
        if step >= first_step(card) and not math.isnan(loss)
    ]
    batches = "look at the batches of these steps. " if card.kind == "loss_spike" else ""
    back = "go back to {checkpoint}, and lower the learning rate or the limit"
    if math.isnan(before) or not within:
        return f"{batches}where the loss has risen and stays up, {back}; where not, let it run"
    worst = max(within)
    if worst <= RISEN * before:
        return f"{batches}the loss has not risen ({before:.3g} before, {worst:.3g} now): let it run"
    too = "" if card.kind == "loss_spike" else " too"
    rose = f"{batches}the loss rose{too}, from {before:.3g} to {worst:.3g} by step {card.step}"
    if later is None or math.isnan(later.loss):
        return f"{rose}: if it stays up, {back}"
    now = f"(median of the last steps {later.loss:.3g})"
    if later.loss > RISEN * before:
        return f"{rose}, and is still up {now}: {back}"
    return f"{rose}, and has come back since {now}: no need to go back to a checkpoint"
