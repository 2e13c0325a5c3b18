"""A card in, lines for a terminal out: what happened, where, what was done, what to do.

The first three lines are for whoever reads no further.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence

from gradwatch.chart import log_chart
from gradwatch.recording.cards import Card
from gradwatch.records import Culprit, Origin
from gradwatch.report.advice import to_do
from gradwatch.report.aftermath import Aftermath
from gradwatch.report.course import (
    first_step,
    num_hit,
    rise_before,
    steps_clipped,
    usual,
    what_is_hit,
)
from gradwatch.report.kinds import name_of
from gradwatch.report.moments import utc
from gradwatch.rules.culprit import REPLAY_HINT
from gradwatch.saying import one_line

__all__ = [
    "card_lines",
    "detail_lines",
    "found",
    "headline",
    "labelled",
    "printable",
    "told",
    "what_came_before",
    "widest",
]

WIDEST_NAME = 60
MOST_SAID = 2000
"""Characters of a message."""

LABEL = 11
"""Columns."""

THE_LOSS = "the loss"
"""Beside what `Culprit.near` may have."""

TIMES = re.compile(r" is ([\d.e+]+)x its median ")

SINCE_CLAUSE = re.compile(
    r"(?P<what>.*?) since step (?P<step>\d+)(?P<how>, [^;]*)?(?P<more>;.*)?", re.DOTALL
)

UPWARD = ("exploding", "loss_spike", "diverging")
"""Kinds that a largest value says how far they went of."""

AT_ONCE = 3
"""Steps with a bad batch that are named."""

BAD_LOSS = re.compile(r"and the loss is (nan|-?inf)")

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


def headline(card: Card) -> str:
    """One line: what, when, where."""
    where = f" in {printable(card.layer)}" if card.layer else ""
    return f"step {card.step}  {card.level} {card.kind}{where}"


def card_lines(card: Card, width: int = 100, num_layers: int = 0) -> Iterator[str]:
    """The whole card; what is text is wrapped, tables are not."""
    run = printable(card.environment.get("run", ""))
    yield f"{headline(card)}, {utc(card.time)}, run {run}"
    for label, text in told(card):
        yield from labelled(label, text, width)
    yield from detail_lines(card, width, num_layers)


def detail_lines(card: Card, width: int = 100, num_layers: int = 0) -> Iterator[str]:
    """The card without what it comes to, for where that is said already.

    Args:
        num_layers: of the model; 0 where that is not known.
    """
    for label, text in (("found", found(card)), *_evidence(card)):
        yield from labelled(label, text, width)
    yield ""
    yield from _history(card)
    if len(card.norms) < num_layers:
        yield f"{len(card.norms)} of {num_layers} layers: that of the finding and its neighbours"
    yield ""
    for label, text in _conditions(card):
        yield from labelled(label, text, width)


def labelled(label: str, text: str, width: int) -> list[str]:
    """`label      text`, wrapped behind the label."""
    return textwrap.wrap(
        text, width, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )  # fmt: skip


def told(card: Card, after: Aftermath | None = None) -> list[tuple[str, str]]:
    """Labels and sentences: what to do, what was done, how it began, how far it went."""
    worst = _worst(card, after) if after is not None and card.kind in UPWARD else ""
    return [
        ("to do", to_do(card, after)),
        ("done", _done(card, after)),
        ("began", _began(card, after)),
        *([("worst", worst)] if worst else []),
    ]


def found(card: Card) -> str:
    """What the detector says, its first step in front, without what `told` has of the origin."""
    message = _without_hint(card.message, card.culprit).removeprefix(f"{card.kind}: ")
    return printable(begun_first(message), MOST_SAID)


def begun_first(message: str) -> str:
    """`... is 5x its median 1 since step 3, just after x; y` as `began in step 3, just after x: ...
    is 5x its median 1; y`: the step is not that of the number in front of it."""
    parts = SINCE_CLAUSE.fullmatch(message)
    if parts is None:
        return message
    what = parts["what"].rstrip(",")
    return f"began in step {parts['step']}{parts['how'] or ''}: {what}{parts['more'] or ''}"


def what_came_before(card: Card) -> list[str]:
    """Clauses, each a fact: what went bad first, what had changed just before."""
    culprit, said = card.culprit, []
    if culprit is not None and culprit.origin is not None:
        said.append(f"began in {_origin(culprit)}")
    rise = rise_before(card)
    if rise is not None:
        steps = _count(first_step(card) - rise.step, "step")
        said.append(f"{steps} after the learning rate rose {rise.times:.3g}x")
    elif culprit is not None and THE_LOSS in culprit.near:
        said.append("together with the loss")
    return said


def widest(card: Card, num_layers: int = 0) -> str:
    """How many layers, or which one; empty where none is meant.

    Args:
        num_layers: of the model; 0 where that is not known.
    """
    hit = num_hit(card)
    if hit > 1:
        noun = what_is_hit(card)
        return f"all {hit} layers" if (noun, hit) == ("layers", num_layers) else f"{hit} {noun}"
    return printable(card.layer or "")


def _origin(culprit: Culprit) -> str:
    assert culprit.origin is not None
    where = culprit.module or " and ".join(culprit.near)
    return BEGAN[culprit.origin].format(where=printable(where))


def _began(card: Card, after: Aftermath | None) -> str:
    culprit, first, rise = card.culprit, first_step(card), rise_before(card)
    said = []
    if rise is not None:
        rates = f"from {rise.before:.3g} to {rise.after:.3g}"
        back = after.rate_back if after is not None else None
        ended = ""
        if back is not None:
            steps = back[0] - rise.step
            ended = (
                f", and was back at {back[1]:.3g} in step {back[0]}, {_count(steps, 'step')} later"
            )
        said.append(f"at step {rise.step} the learning rate rose {rates}{ended}")
    hit = num_hit(card)
    many = hit > 1 and card.layer is not None and card.kind != "nonfinite"
    if rise is not None or first < card.step:
        where = f" in {hit} {what_is_hit(card)}" if many else ""
        said.append(f"{name_of(card.kind)} from step {first} on{where}")
    if culprit is not None and culprit.origin is not None:
        said.append(f"in {_origin(culprit)}")
    elif culprit is not None and card.kind == "nonfinite":
        said.append(_undetermined(culprit.message.removesuffix(REPLAY_HINT)))
    if many:
        if after is None or after.layer is None or card.kind not in UPWARD:
            worst = f"{printable(card.layer)}{_times(card)}"
            said.append(f"furthest off in step {card.step}: {worst}")
    elif card.layer and (culprit is None or culprit.module != card.layer):
        said.append(f"layer {printable(card.layer)}{_times(card)}")
    return printable("; ".join(said) or "not determined", MOST_SAID)


def _undetermined(message: str) -> str:
    """With what follows from it: a loss that was not finite was made before the backward pass."""
    loss = BAD_LOSS.search(message)
    if loss is None:
        return message
    return (
        f"with the loss, which was {loss[1]} before the backward pass: the batch, the forward pass "
        "or the loss function gave it, not the gradients; which of these is not determined"
    )


def _times(card: Card) -> str:
    """By which the detector has it, so that no second median is told of."""
    ratio = TIMES.search(card.message)
    return f" ({ratio[1]}x its median)" if ratio is not None else ""


def _times_as_said(times: float) -> str:
    return f"{times:.3g}x" if times < 999.5 else f"{times:,.0f}x"


def _worst(card: Card, after: Aftermath) -> str:
    """The largest of each number in all the steps that were looked at, with its step."""
    said = []
    if after.layer is not None:
        peak = after.layer
        said.append(
            f"{printable(peak.layer)} {_times_as_said(peak.value)} its median in step {peak.step}"
        )
    for name, peak_of, series in (
        ("total norm", after.norm, "total_norm"),
        ("loss", after.loss, "loss"),
    ):
        if peak_of is not None:
            before = usual(card, card.series.get(series, ()))
            was = "" if math.isnan(before) else f" ({before:.3g} before)"
            said.append(f"{name} {peak_of.value:.3g}{was} in step {peak_of.step}")
    part = ""
    if after.until < after.step - 1:
        part = f"of steps {after.first} to {after.until}: "
    return part + ", ".join(said) if said else ""


def _done(card: Card, after: Aftermath | None) -> str:
    reason = printable(card.skipped or "")
    if not card.was_dropped and card.environment.get("mode") != "enforce":
        would = f"; mode: enforce would have skipped it ({reason})" if reason else ""
        return f"nothing: no policy is enforced, and step {card.step} was taken as it was{would}"
    if card.was_dropped:
        which = f"step {card.step} was"
        if after is not None and card.kind == "nonfinite" and after.nonfinite_steps:
            few = after.num_skipped < after.num_nonfinite
            which = f"{f'{after.num_skipped} of ' if few else ''}{after.nonfinite_steps} were"
        return f"{which} skipped ({reason}): weights and optimizer as before{_of_buffers(after)}"
    by = _clipped_since(after) if after is not None else _clipped(card)
    rise = rise_before(card)
    if after is not None and rise is not None and after.rise_taken:
        back = after.rate_back
        until = "" if back is None else f" to {back[0] - 1}"
        is_one = back is not None and back[0] - 1 <= rise.step
        which = f"step {rise.step} was" if is_one else f"steps {rise.step}{until} were"
        by += (
            f"; {which} taken at the raised learning rate, which a limit on the norm does not "
            "hold back"
        )
    return by


def _of_buffers(after: Aftermath | None) -> str:
    if after is not None and after.batch_norms:
        names = ", ".join(printable(name) for name in after.batch_norms[:AT_ONCE])
        more = ", ..." if len(after.batch_norms) > AT_ONCE else ""
        return f". Not undone: what its forward pass did to BatchNorm statistics ({names}{more})"
    return ". Not undone: what its forward pass did to buffers, such as running statistics"


def _clipped_since(after: Aftermath) -> str:
    until = f"to {after.until}" if after.until < after.step - 1 else "on"
    of_all = f"of the {_count(after.num_steps, 'step')} from {after.first} {until}"
    if not after.num_clipped or after.hardest is None:
        return f"nothing: none {of_all} was clipped"
    step, before, clipped = after.hardest
    rules = ", ".join(printable(rule) for rule in after.fired[:AT_ONCE])
    by = f" by the rule {rules}" if rules else ""
    hardest = f"the hardest in step {step}, {before:.3g} -> {clipped:.3g}"
    were = "was" if after.num_clipped == 1 else "were"
    return f"{after.num_clipped} {of_all} {were} clipped{by} ({hardest}) and taken"


def _clipped(card: Card) -> str:
    """By what the card alone holds."""
    clipped = steps_clipped(card)
    if not clipped:
        return f"nothing: step {card.step} was taken as it was"
    one = len(clipped) == 1
    which = f"step {clipped[0]} was" if one else f"steps {clipped[0]} to {clipped[-1]} were"
    if clipped[-1] - clipped[0] >= len(clipped):
        which = f"{len(clipped)} of the steps {clipped[0]} to {clipped[-1]} were"
    fired = ", ".join(printable(rule) for rule in card.fired)
    by = ""
    if card.clip_coef < 1:
        before, after = (card.series[name][-1] for name in ("total_norm", "total_norm_clipped"))
        by = f" by the rule {fired} (step {card.step}: {before:.3g} -> {after:.3g})"
    return f"{which} clipped{by} and taken"


def _without_hint(message: str, culprit: Culprit | None) -> str:
    """Of what is not determined a message of the log says more than a page has to repeat."""
    if culprit is not None and culprit.message and culprit.origin is None:
        message = message.replace(f"; {culprit.message}", "")
    return message.replace(REPLAY_HINT, "")


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
    """A line for each series: its course, what it was before the finding, its value at the end."""
    rows = {name: card.series[name] for name in ("total_norm", "loss") if name in card.series}
    rows["learning rate"] = card.series.get("learning_rate", ())
    rows = {**rows, **{f"layer {printable(name)}": norms for name, norms in card.norms.items()}}
    width = max(len(name) for name in rows)
    steps = f"steps {card.steps[0]} to {card.steps[-1]}"
    before = f"before {first_step(card)}"
    end = f"step {card.steps[-1]}"
    yield f"{steps:<{width}}  {'':<{len(card.steps)}}  {before:>14}  {end:>10}"
    for name, values in rows.items():
        if all(map(math.isnan, values)) and not name.startswith(("total_norm", "layer ")):
            continue
        chart = log_chart(values, 1)[0]
        known = usual(card, values)
        median = "-" if math.isnan(known) else f"{known:.4g}"
        yield f"{name:<{width}}  {chart}  {median:>14}  {values[-1]:>10.4g}"


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
    shown = one_line(text or "")
    return shown if len(shown) <= widest else f"{shown[: widest - 3]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
