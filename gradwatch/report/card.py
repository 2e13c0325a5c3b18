"""A card in, lines for a terminal out: what happened, where, what was done, what to do.

The first three lines are for whoever reads no further.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterator, Sequence

import numpy as np

from gradwatch.chart import log_chart
from gradwatch.recording.cards import Card
from gradwatch.records import Origin

__all__ = ["card_lines", "headline", "labelled", "printable", "told"]

WIDEST_NAME = 60
MOST_SAID = 2000
"""Characters of a message."""

LABEL = 11
"""Columns."""

LATENCY = 5
"""Steps that it may have lasted when it is found."""

RAISED = 1.5
"""Times its first value that a learning rate must be to be spoken of."""

RISEN = 1.3
"""Times its median that a loss must be to have risen."""

AT_ONCE = 3
"""Steps with a bad batch that are named."""

EVIDENCE = {
    "flags": "gradients, weights and loss of the step",
    "replay": "the forward pass, run once more",
    "live": "flags of every module, set as the pass ran",
}
BEGAN: dict[Origin, str] = {
    "input": "what the model was given",
    "weight": "the weights of {where}",
    "forward": "the forward pass of {where}",
    "loss": "the loss",
    "gradient": "the backward pass, at {where}",
}
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
    "exploding": "where the loss has risen too, go back to {checkpoint} and lower the learning "
    "rate or clip; where it has not, let it run",
    "loss_spike": "look at the batches of these steps; where it does not come down, go back to "
    "{checkpoint}",
    "diverging": "go back to the last healthy checkpoint and lower the learning rate",
    "rank_divergence": "go back to {checkpoint}: since then the ranks train different models. Look "
    "for memory errors and for code that one rank alone runs",
    "rank_outlier": "compare the data, the seed and the hardware of that rank with the others",
    "vanishing": "look at initialisation, normalisation and skip connections before that layer",
    "loss_scale_collapse": "look for what is not finite at any scale: see the card before this one",
}


def headline(card: Card) -> str:
    """One line: what, when, where."""
    where = f" in {printable(card.layer)}" if card.layer else ""
    return f"step {card.step}  {card.level} {card.kind}{where}"


def card_lines(card: Card, width: int = 100) -> Iterator[str]:
    """The whole card; what is text is wrapped, tables are not."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(card.time))
    yield f"{headline(card)}, {when}, run {printable(card.environment.get('run', ''))}"
    for label, text in (*told(card), *_evidence(card)):
        yield from labelled(label, text, width)
    yield ""
    yield from _history(card)
    yield ""
    for label, text in _conditions(card):
        yield from labelled(label, text, width)


def labelled(label: str, text: str, width: int) -> list[str]:
    """`label      text`, wrapped behind the label."""
    return textwrap.wrap(
        text, width, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )  # fmt: skip


def _began(card: Card) -> str:
    culprit = card.culprit
    if culprit is None or culprit.origin is None:
        where = f"; worst layer {printable(card.layer)}" if card.layer else ""
        return f"not determined{where}"
    where = culprit.module or " and ".join(culprit.near)
    return BEGAN[culprit.origin].format(where=printable(where))


def _done(card: Card) -> str:
    if card.environment.get("mode") != "enforce" and (card.skipped or card.clip_coef < 1):
        return "nothing: the policy is not enforced, and the step was taken as it was"
    if card.skipped:
        return f"the step was skipped ({printable(card.skipped)}): weights and optimizer as before"
    if card.clip_coef < 1:
        fired = ", ".join(printable(rule) for rule in card.fired)
        return f"the gradient was multiplied by {card.clip_coef:.3g} ({fired}), and the step taken"
    return "nothing: the step was taken as it was"


def _to_do(card: Card) -> str:
    checkpoint = f"a checkpoint from before step {max(0, card.step - LATENCY)}"
    origin = None if card.culprit is None else card.culprit.origin
    if card.kind == "exploding":
        said = _after_an_explosion(card)
    elif card.kind in OTHERWISE:
        said = OTHERWISE[card.kind]
    elif origin is not None:
        said = TO_DO[origin]
    elif card.kind == "nonfinite":
        said = "set detect.culprit: replay in the policy, which names where it began the next time"
        if card.skipped:
            said = f"nothing urgent if it is this step alone. Look at its batch; {said}"
        else:
            said = f"where the loss is not finite, go back to {{checkpoint}}; {said}"
    else:
        said = f"see what docs/detectors.md says of {card.kind}"
    return said.format(checkpoint=checkpoint)


def _after_an_explosion(card: Card) -> str:
    """By what the learning rate and the loss have done in the steps of the card."""
    rates = [rate for rate in card.series.get("learning_rate", ()) if math.isfinite(rate)]
    raised = ""
    if rates and max(rates) > RAISED * rates[0] > 0:
        raised = f"find what set the learning rate to {max(rates):.3g} ({rates[0]:.3g} before). "
    losses = [loss for loss in card.series.get("loss", ()) if not math.isnan(loss)]
    if len(losses) < 2 * LATENCY:
        return raised + OTHERWISE["exploding"]
    before, now = float(np.median(losses[:-LATENCY])), max(losses[-LATENCY:])
    if now > RISEN * before:
        return (
            f"{raised}The loss has risen too, from {before:.3g} to {now:.3g}: if it stays up, go "
            "back to {checkpoint}, and lower the learning rate or the limit"
        )
    return f"{raised}The loss has not risen ({before:.3g} before, {now:.3g} now): let it run"


def _evidence(card: Card) -> Iterator[tuple[str, str]]:
    culprit = card.culprit
    if culprit is None:
        return
    if culprit.message not in card.message:
        yield "", printable(culprit.message, MOST_SAID)
    yield "evidence", EVIDENCE.get(culprit.evidence, culprit.evidence)
    if culprit.batch:
        again = culprit.same_batch
        listed = ", ".join(map(str, again[-AT_ONCE:]))
        yield (
            "batch",
            f"{culprit.batch}, " + (f"the same as in step {listed}" if again else "not bad before"),
        )


def _history(card: Card) -> Iterator[str]:
    """A line for each series: its course, its median before the step, and its value in it."""
    rows = {name: card.series[name] for name in ("total_norm", "loss") if name in card.series}
    rows = {**rows, **{f"layer {printable(name)}": norms for name, norms in card.norms.items()}}
    width = max(len(name) for name in rows)
    steps = f"steps {card.steps[0]} to {card.steps[-1]}"
    yield f"{steps:<{width}}  {'':<{len(card.steps)}}  {'median before':>13}  {'at step':>10}"
    for name, values in rows.items():
        if all(map(math.isnan, values)) and name == "loss":
            continue
        chart = log_chart(values, 1)[0]
        before = [value for value in values[:-1] if math.isfinite(value)]
        median = f"{np.median(before):.4g}" if before else "-"
        yield f"{name:<{width}}  {chart}  {median:>13}  {values[-1]:>10.4g}"


def _conditions(card: Card) -> Iterator[tuple[str, str]]:
    limits = [f"{printable(rule)} {limit:.4g}" for rule, limit in card.limits.items()]
    environment = {name: printable(value) for name, value in card.environment.items() if value}
    yield "limits", f"{', '.join(limits) or 'none'}; mode {environment.pop('mode', '')}"
    count = card.micro_batches
    yield (
        "step",
        ", ".join(
            [
                _number(card, "learning_rate"),
                _number(card, "loss_scale"),
                f"{count} micro-batch{'es' * (count != 1)}",
            ]
        ),
    )
    environment.pop("policy_sha256", None)
    environment.pop("run", None)
    yield "policy", printable(card.environment.get("policy_sha256"), 64) or "none"
    yield "on", ", ".join(f"{name} {value}" for name, value in environment.items())


def _number(card: Card, name: str) -> str:
    value: Sequence[float] = card.series.get(name, ())
    said = name.replace("_", " ")
    return f"{said} {value[-1]:.4g}" if value and math.isfinite(value[-1]) else f"no {said}"


def printable(text: str | None, widest: int = WIDEST_NAME) -> str:
    """Text from outside, without what a terminal would act on, and cut where it is long."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text or "")
    return shown if len(shown) <= widest else f"{shown[: widest - 3]}..."


def told(card: Card) -> list[tuple[str, str]]:
    """Labels and sentences: where it began, what was done, what to do, what was found."""
    return [
        ("began in", _began(card)),
        ("done", _done(card)),
        ("to do", _to_do(card)),
        ("found", printable(card.message, MOST_SAID)),
    ]
