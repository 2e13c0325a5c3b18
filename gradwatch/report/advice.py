"""A card in, what to do about it out, by what went bad first and how it went on."""

from __future__ import annotations

import math

from gradwatch.policy import Detect
from gradwatch.recording.cards import Card
from gradwatch.records import Origin
from gradwatch.report.aftermath import Aftermath
from gradwatch.report.course import RISEN, SAME, first_step, rise_before, usual

__all__ = ["OTHERWISE", "to_do"]

SAMPLED = Detect().every
"""Steps for which what only a sample shows may have been there before it."""

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
    "clipped_elsewhere": "take clip_grad_norm_, or the clipping of the trainer, out and put its "
    "limit into the policy: until then every norm here is of what it leaves",
    "loss_scale_collapse": "look for what is not finite at any scale: see the card before this one",
}


def to_do(card: Card, after: Aftermath | None = None) -> str:
    """A sentence or two.

    Args:
        after: None where all that is known is the card.
    """
    rise = rise_before(card)
    bad_from = _bad_from(card) if rise is None else rise.step
    checkpoint = f"a checkpoint from before step {bad_from}"
    origin = None if card.culprit is None else card.culprit.origin
    if card.kind in ("exploding", "loss_spike"):
        said = _by_the_loss(card, after)
    elif card.kind in OTHERWISE:
        said = OTHERWISE[card.kind]
    elif origin is not None:
        said = TO_DO[origin]
    elif card.kind == "nonfinite":
        said = _after_a_nonfinite_step(card, after)
    else:
        said = f"see what docs/detectors.md says of {card.kind}"
    if rise is not None:
        back = after.rate_back if after is not None else None
        again = f"back to {back[1]:.3g} at {back[0]}" if back else f"{rise.before:.3g} before"
        set_to = f"{rise.after:.3g} at step {rise.step} ({again})"
        said = f"first find what set the learning rate to {set_to}; then {said}"
    return said.format(checkpoint=checkpoint, first=first_step(card))


def _bad_from(card: Card) -> int:
    """A checkpoint from before this step is a good one."""
    first = first_step(card)
    if card.kind == "dead":
        return max(0, first - SAMPLED)
    if card.culprit is not None and card.culprit.origin == "weight":
        return max(0, first - 1)
    return first


def _after_a_nonfinite_step(card: Card, after: Aftermath | None) -> str:
    if not card.was_dropped:
        return (
            "where the loss is not finite, go back to {checkpoint}; set detect.culprit: replay in "
            "the policy file to be told where it began the next time"
        )
    if after is not None and after.nonfinite_steps:
        return (
            f"look for NaN or inf in the batches of these {after.nonfinite_steps}, which nothing "
            "was learnt from: so many are not one bad batch, but the loader, a part of the data or "
            "the scale. guard.patience: 10 in the policy file stops a run after ten in a row"
        )
    over = after is not None and after.good_since is not None
    alone = "" if over else " if it is this step alone"
    return (
        f"nothing urgent{alone}; look for NaN or inf in the batch of step {card.step}. "
        "detect.culprit: replay in the policy file (reads what goes in and out each step) names "
        "the module next time"
    )


def _by_the_loss(card: Card, after: Aftermath | None) -> str:
    """By what the loss has done in the abnormal steps, and since."""
    losses = card.series.get("loss", ())
    before = usual(card, losses)
    within = [
        (loss, -step)
        for step, loss in zip(card.steps, losses, strict=False)
        if step >= first_step(card) and not math.isnan(loss)
    ]
    batches = "look at the batches of these steps; " if card.kind == "loss_spike" else ""
    back = "go back to {checkpoint}, and lower the learning rate or the limit"
    if math.isnan(before) or not within:
        return f"{batches}where the loss has risen and stays up, {back}; where not, let it run"
    worst, at = max(within)
    if after is not None and after.loss is not None and after.loss.value > worst:
        worst, at = after.loss.value, -after.loss.step
    now = math.nan if after is None else after.loss_now
    if now > RISEN * before:
        return f"{batches}the loss is still up, {now:.3g} ({before:.3g} before): {back}"
    if math.isnan(now):
        if worst <= RISEN * before:
            at_most = f"{before:.3g} before, {worst:.3g} at most"
            return f"{batches}the loss has not risen ({at_most}): let it run"
        rose = f"the loss rose from {before:.3g} to {worst:.3g} by step {-at}"
        return f"{batches}{rose}: if it stays up, {back}"
    if now <= SAME * before:
        return f"{batches}the loss, {now:.3g}, is back where it was ({before:.3g}): let it run"
    return (
        f"{batches}evaluate {{checkpoint}} too and go on from the better one (the loss, {now:.3g}, "
        f"is {now / before - 1:.0%} above before)"
    )
