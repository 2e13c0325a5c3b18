"""What went bad first in a step that is not finite: from clues to a culprit.

    Clues: weights, forward passes, gradients in backward order, the loss  ->  Culprit

Where two explanations remain, no module is named and both are said. Weights that are bad before an
update and were used, and a module that makes bad outputs of good inputs, are evidence. The loss is
found by exclusion, and only where it was logged before the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradwatch.records import Culprit, Evidence
from gradwatch.rules.culprit_forward import MASKED, Call, Flag, of_forward
from gradwatch.rules.culprit_gradients import (
    LOSS,
    ModuleGradient,
    are_all_bad,
    border,
    of_gradients,
)
from gradwatch.rules.culprit_weights import LISTED, BadWeight, name_of, of_weights

__all__ = ["REPLAY_HINT", "Clues", "Forward", "Pass", "of_step"]

REPLAY_HINT = " (detect.culprit: replay would tell more)"


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of the model in the step, as it was."""

    inputs: Flag
    outputs: Flag
    calls: Sequence[Call] = ()
    """Of all modules in it; none where they were not looked at."""

    handed: Sequence[Flag] = ()
    """The gradients that were handed back to its outputs, each FINE or BAD; none where they were
    not seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What is known of the forward passes of a step."""

    evidence: Evidence
    passes: Sequence[Pass] = ()
    """All that were seen, in order."""

    unseen: int = 0
    """Passes of the step of which nothing was kept."""

    ungraded: int = 0
    """Passes without gradients since the last step, of which nothing was kept: of a teacher, of
    which a loss may be made, or of an evaluation."""

    repeated: int | None = None
    """Index of the pass whose calls are those of its repetition, not its own."""

    unknown: str = ""
    """Why there is none, or why none was run again, as a clause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clues:
    """What a framework knows of a step that is not finite."""

    bad_weights: Sequence[BadWeight] | None = None
    """None where they are not known: the update was made."""

    foreign: Sequence[str] = ()
    """Modules with weights that are not finite and that something else updates."""

    forward: Forward | None = None
    """None where nobody looked."""

    order: Sequence[int] = ()
    """Parameters by their place in the layout, in the order that a backward pass comes to them."""

    is_order_sure: bool = False
    """Whether more than one backward pass had it, and none had another."""

    own_is_bad: bool | None = None
    """Whether gradients were not finite as a backward pass left them, before anything was done to
    them, such as the averaging with those of other processes; None where that is not known."""

    batch: str = ""
    """Hash of what the model was called with last."""


def of_step(clues: Clues, gradients: Sequence[ModuleGradient], loss: float | None) -> Culprit:
    """
    Args:
        gradients: of the modules, in backward order.
        loss: as it was logged before the step, or None.
    """
    forward = clues.forward
    if clues.foreign:
        return Culprit(
            near=tuple(clues.foreign[:LISTED]),
            message=f"not determined: weights of {clues.foreign[0]}, which another optimizer "
            "updates, hold NaN or inf",
        )
    seen = forward is not None and bool(forward.passes)
    fine = forward is not None and seen and _is_known(forward)
    handed = _handed(forward.passes) if forward is not None else Flag.UNKNOWN
    along = of_gradients(
        gradients,
        loss,
        forward_is_fine=fine,
        is_order_sure=clues.is_order_sure,
        is_loss_whole=handed is Flag.FINE,
    )
    beside = border(gradients) if along.origin is not None else ()
    in_weights = of_weights(clues.bad_weights or (), beside)
    if forward is None or not seen:
        found = in_weights or along
        if found.origin is not None:
            return found
        if forward is None:
            return _with(found, REPLAY_HINT)
        return _with(found, f"; the forward pass is not known: {forward.unknown}")
    in_forward = _of_passes(forward, clues.bad_weights, loss)
    if in_forward is not None:
        return replace(in_forward, evidence=forward.evidence)
    if in_weights is not None:
        if loss is None or math.isfinite(loss) or in_weights.origin is None:
            return in_weights  # tanh hides an inf on the way forward, not on the way back
        return replace(
            in_weights, origin=None, module=None,
            message=f"not determined: {in_weights.message}, and the loss is {loss} while what the "
            "model puts out is finite",
        )  # fmt: skip
    if clues.own_is_bad is False and are_all_bad(gradients):
        return Culprit(
            evidence=forward.evidence,
            message="not determined: the backward pass left gradients that are finite; something "
            "was done to them between it and the step, such as a division by their norm",
        )
    return _of_backward(forward, handed, along, gradients, loss, clues)


def _of_backward(
    forward: Forward,
    handed: Flag,
    along: Culprit,
    gradients: Sequence[ModuleGradient],
    loss: float | None,
    clues: Clues,
) -> Culprit:
    """Neither a forward pass nor a weight was bad, as far as is known."""
    if handed is Flag.MINUS:
        return Culprit(
            near=(*border(gradients)[:1], LOSS),
            message="not determined: what was handed back to some outputs of the model is finite "
            "and to others is not: one of several losses, or between two outputs",
        )
    if along.origin is not None and handed is not Flag.BAD:
        return along
    if handed is not Flag.BAD and not are_all_bad(gradients):
        return along
    if (first := _minus(forward.passes)) is not None:
        said = f"; the model puts out -inf, which {first} was the first to hold: masked on "
        return _with(_undetermined(along), f"{said}purpose, or a logarithm of 0")
    if forward.unseen:
        said = f"; {forward.unseen} forward passes of the step were not kept"
        return _with(_undetermined(along), said)
    if not _is_known(forward, inputs=handed is not Flag.BAD):
        said = "; what went in or came out of the model could not be looked into"
        return _with(_undetermined(along), said)
    if handed is Flag.FINE:
        if clues.own_is_bad is not True:
            return _with(_undetermined(along), "; what was handed back to the model is finite: its "
                         "backward pass, or what was done to gradients since")  # fmt: skip
        return Culprit(
            origin="gradient",
            near=border(gradients)[:1] if clues.is_order_sure else (),
            evidence=forward.evidence,
            message="what was handed back to the model is finite and every gradient is not: its "
            "backward pass went bad behind its outputs",
        )
    if forward.ungraded:
        said = f"; {forward.ungraded} forward passes without gradients were not looked into"
        return _with(_undetermined(along), said)
    first_module = gradients[0].module if clues.is_order_sure and gradients else "the model"
    return _outside_of_the_model(along, first_module, loss, forward.evidence)


def _undetermined(found: Culprit) -> Culprit:
    if found.origin is None:
        return found
    return Culprit(near=found.near, message=f"not determined: {found.message}")


def _handed(passes: Sequence[Pass]) -> Flag:
    """What all passes together were handed back: MINUS where some of it is bad and some is not."""
    flags = [flag for one in passes for flag in one.handed]
    if not flags or not all(one.handed for one in passes):
        return Flag.UNKNOWN
    by_pass = [set(one.handed) for one in passes]
    if all(flag is Flag.FINE for flag in flags):
        return Flag.FINE
    return Flag.MINUS if any(len(of_one) > 1 for of_one in by_pass) else Flag.BAD


def _is_known(forward: Forward, *, inputs: bool = True) -> bool:
    """Whether every pass of the step is known to be fine.

    Args:
        inputs: whether what the model was called with counts, too.
    """
    fine = all(
        one.outputs is Flag.FINE and (not inputs or one.inputs in (Flag.FINE, Flag.MASK))
        for one in forward.passes
    )
    return fine and not forward.unseen


def _minus(passes: Sequence[Pass]) -> str | None:
    """Who held -inf first, in a pass in which the model puts it out."""
    for one in passes:
        if one.outputs in MASKED:
            return next((name_of(c.module) for c in one.calls if c.outputs in MASKED), "it")
    return None


def _outside_of_the_model(
    found: Culprit, first: str, loss: float | None, evidence: Evidence
) -> Culprit:
    """Every gradient is bad or what the model was handed back is, and what it puts out is not."""
    if loss is None:
        return _with(
            found, "; what the model puts out is finite, so that it is the loss or its gradient"
        )
    if math.isfinite(loss):
        return Culprit(
            origin="gradient",
            near=(first, LOSS),
            evidence=evidence,
            message=f"the loss is finite ({loss:.4g}), so is what the model puts out, and what it "
            f"was handed back is not: the backward pass went bad between the loss and {first}, or "
            "in a loss that was not logged",
        )
    return Culprit(
        origin="loss",
        evidence=evidence,
        message=f"the loss is {loss} and what the model puts out is finite: look at the targets, "
        "the loss function and, where it is behind another model, at that",
    )


def _of_passes(
    forward: Forward, bad_weights: Sequence[BadWeight] | None, loss: float | None
) -> Culprit | None:
    """What the first bad pass says; None where all of them are fine."""
    count = len(forward.passes) + forward.unseen
    for number, one in enumerate(forward.passes, start=1):
        which = f" (forward pass {number} of {count})" if count > 1 else ""
        # What the model keeps from its outputs does not make the loss bad.
        is_kept_in = one.outputs is not Flag.BAD and _is_behind(one, loss)
        if one.inputs is Flag.BAD and not is_kept_in:
            said = f"what the model was called with holds NaN or inf{which}"
            return Culprit(origin="input", message=said)
        if one.calls and one.calls[-1].inputs is Flag.BAD and one.inputs <= Flag.MASK:
            said = "what the model was called with is finite, and not what reached it"
            return Culprit(message=f"not determined: {said}: what wraps it, or a hook{which}")
        again = number - 1 == forward.repeated
        found = of_forward(one.calls, bad_weights) if one.calls else None
        if again and (found is None) != (one.outputs is not Flag.BAD) and not is_kept_in:
            return _not_repeated(one, found, which)
        if found is not None and not is_kept_in:
            return _with(found, which)
        if one.outputs is Flag.BAD:
            found = of_weights(bad_weights or ()) or Culprit(
                message="not determined: the model put out NaN or inf, and no module is known to "
                "have made it of finite inputs"
            )
            why = "its batch was not kept" if forward.repeated is not None else forward.unknown
            return _with(found, f"{which}; {why}" if why else which)
    return None


def _is_behind(one: Pass, loss: float | None) -> bool:
    """Whether it is behind the model that something was bad."""
    if loss is not None and not math.isfinite(loss):
        return True
    return bool(one.handed) and all(flag is Flag.BAD for flag in one.handed)


def _not_repeated(one: Pass, found: Culprit | None, which: str) -> Culprit | None:
    """A pass and its repetition disagree."""
    if found is not None and one.calls[-1].outputs is not Flag.BAD:
        return _with(found, which)  # masked within the model, so that its outputs do not show it
    was, then = (
        ("NaN or inf", "finite values") if found is None else ("finite values", "NaN or inf")
    )
    return Culprit(
        message=f"not determined: the model put out {was}, and {then} when run again with the same "
        f"batch{which}: a fault that does not come again, such as one of the hardware, or a model "
        "that depends on more than its batch"
    )


def _with(found: Culprit, said: str) -> Culprit:
    return replace(found, message=found.message + said)
