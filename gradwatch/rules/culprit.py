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
from gradwatch.rules.culprit_weights import LISTED, BadWeight, name_of, of_weights

__all__ = ["Clues", "Forward", "ModuleGradient", "Pass", "modules_of", "of_gradients", "of_step"]

LOSS = "the loss"


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of the model in the step, as it was."""

    inputs: Flag
    outputs: Flag
    calls: Sequence[Call] = ()
    """Of all modules in it; none where they were not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What is known of the forward passes of a step."""

    evidence: Evidence
    passes: Sequence[Pass] = ()
    """All that were seen, in order."""

    unseen: int = 0
    """Passes of the step of which nothing was kept."""

    repeated: int | None = None
    """Index of the pass whose calls are those of its repetition, not its own."""

    unknown: str = ""
    """Why there is none, or why none was run again, as a clause."""


@dataclass(frozen=True, slots=True)
class ModuleGradient:
    """The gradients of one module's own parameters."""

    module: str
    is_finite: bool
    bias_only: bool = False
    """Whether that of its bias is finite although others are not."""

    bias_too: bool = True
    """Whether that of a bias is not finite: what the module hands back was bad, whatever it was
    given."""


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
    """Whether the gradient of this process alone was not finite, before it was averaged with those
    of others; None where that is not known."""

    batch: str = ""
    """Hash of what the model was called with last."""


def of_step(clues: Clues, gradients: Sequence[ModuleGradient], loss: float | None) -> Culprit:
    """
    Args:
        gradients: of the modules, in backward order.
        loss: as it was logged before the step, or None.
    """
    bad_weights = clues.bad_weights or ()
    forward = clues.forward
    if clues.foreign:
        return Culprit(
            near=tuple(clues.foreign[:LISTED]),
            message=f"not determined: weights of {clues.foreign[0]}, which another optimizer "
            "updates, hold NaN or inf",
        )
    sure = clues.is_order_sure
    fine = forward is not None and bool(forward.passes) and _is_known(forward)
    found = of_gradients(gradients, loss, forward_is_fine=fine, is_order_sure=sure)
    in_weights = of_weights(bad_weights, found.near if found.origin is not None else ())
    if forward is None or not forward.passes:
        found = in_weights or found
        if found.origin is not None:
            return found
        if forward is None:
            return _with(found, " (detect.culprit: replay would tell more)")
        return _with(found, f"; the forward pass is not known: {forward.unknown}")
    in_forward = _of_passes(forward, bad_weights)
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
    if found.origin is not None or not _all_bad(gradients):
        return found
    if (first := _minus(forward.passes)) is not None:
        said = f"; the model puts out -inf, which {first} was the first to hold: masked on "
        return _with(found, f"{said}purpose, or a logarithm of 0")
    if forward.unseen:
        return _with(found, f"; {forward.unseen} forward passes of the step were not kept")
    if not fine:
        return _with(found, "; what went in or came out of the model could not be looked into")
    first = gradients[0].module if sure else "the model"
    return _outside_of_the_model(found, first, loss, forward.evidence)


def _is_known(forward: Forward) -> bool:
    """Whether every pass of the step is known to be fine."""
    fine = all(
        one.inputs in (Flag.FINE, Flag.MASK) and one.outputs is Flag.FINE for one in forward.passes
    )
    return fine and not forward.unseen


def _minus(passes: Sequence[Pass]) -> str | None:
    """Who held -inf first, in a pass in which the model puts it out."""
    for one in passes:
        if one.outputs in MASKED:
            return next((name_of(c.module) for c in one.calls if c.outputs in MASKED), "it")
    return None


def _all_bad(gradients: Sequence[ModuleGradient]) -> bool:
    """Whether gradients are bad from the first one of the backward pass on."""
    if not gradients or gradients[0].bias_only:
        return False
    return not any(one.is_finite for one in gradients)


def _outside_of_the_model(
    found: Culprit, first: str, loss: float | None, evidence: Evidence
) -> Culprit:
    """Every gradient is bad, and what the model puts out is finite."""
    if loss is None:
        return _with(
            found, "; what the model puts out is finite, so that it is the loss or its gradient"
        )
    if math.isfinite(loss):
        return Culprit(
            origin="gradient",
            near=(first, LOSS),
            evidence=evidence,
            message=f"the loss is finite ({loss:.4g}), so is what the model puts out, and every "
            f"gradient is not: the backward pass went bad between the loss and {first}",
        )
    return Culprit(
        origin="loss",
        evidence=evidence,
        message=f"the loss is {loss} and what the model puts out is finite: look at the targets, "
        "the loss function and, where it is behind another model, at that",
    )


def modules_of(
    parameters: Sequence[str], finite: Sequence[bool], order: Sequence[int]
) -> tuple[ModuleGradient, ...]:
    """The gradients of modules in backward order, from those of parameters.

    Args:
        parameters: names, of all [P].
        finite: [P] whether the gradient of each is finite.
        order: places of those parameters whose place in the backward pass is known.
    """
    members: dict[str, list[int]] = {}
    for place in order:
        members.setdefault(parameters[place].rpartition(".")[0], []).append(place)
    found = []
    for module, places in members.items():
        is_bias = [parameters[i].rpartition(".")[2].startswith("bias") for i in places]
        biases = [finite[i] for i, bias in zip(places, is_bias, strict=True) if bias]
        others = [finite[i] for i, bias in zip(places, is_bias, strict=True) if not bias]
        bias_only = bool(biases) and all(biases) and not all(others)
        found.append(
            ModuleGradient(
                name_of(module),
                all(finite[i] for i in places),
                bias_only=bias_only,
                bias_too=not all(biases),
            )
        )
    return tuple(found)


def of_gradients(
    gradients: Sequence[ModuleGradient],
    loss: float | None,
    *,
    forward_is_fine: bool = False,
    is_order_sure: bool = False,
) -> Culprit:
    """Where along the backward pass gradients went bad, where that can be told from them.

    Args:
        forward_is_fine: whether all that the model was given and has put out is known to be finite.
        is_order_sure: whether every backward pass is known to have the order of `gradients`.
    """
    found = _along_the_pass(gradients, loss, forward_is_fine)
    if found.origin is None or is_order_sure:
        return found
    return Culprit(
        near=found.near,
        message=f"not determined: {found.message}, in the order of another backward pass; whether "
        "that of this step had the same is not known",
    )


def _along_the_pass(
    gradients: Sequence[ModuleGradient], loss: float | None, forward_is_fine: bool
) -> Culprit:
    if not gradients:
        return Culprit(message="not determined: gradients hold NaN or inf, and the order of their "
                       "backward pass is not known")  # fmt: skip
    bad = [one.module for one in gradients if not one.is_finite]
    if not bad:
        return Culprit(message="not determined: the gradient of every module is finite")
    first = next(i for i, one in enumerate(gradients) if not one.is_finite)
    module, behind = gradients[first].module, gradients[first + 1 :]
    if gradients[first].bias_only:
        return Culprit(
            near=(module,),
            message=f"not determined: the gradient of {module}'s bias is finite and that of its "
            "weight is not, so that what it was given in the forward pass was not finite, or too "
            "large for the precision of its gradient",
        )
    if first > 0 and (loss is None or not math.isfinite(loss)):
        said = "no loss was logged before the step" if loss is None else f"the loss is {loss}"
        return Culprit(
            near=(module, gradients[first - 1].module),
            message=f"not determined: the gradient of {module} is the first that holds NaN or inf, "
            f"behind {gradients[first - 1].module}, and {said}: a backward pass that went bad, or "
            "one of several losses",
        )
    # A bad input spoils the gradient of one weight, a bad gradient those of all behind it too.
    witnessed = gradients[first].bias_too or forward_is_fine
    if len(bad) == 1 and not witnessed:
        return Culprit(
            near=(module,),
            message=f"not determined: the gradient of {module} holds NaN or inf, and that of no "
            "other module: what it was given, or what it was handed back",
        )
    if len(bad) == 1 and behind:
        return Culprit(
            origin="gradient",
            module=module,
            near=(module,),
            message=f"the gradient of {module} holds NaN or inf, and that of no other module",
        )
    if any(one.is_finite for one in behind):
        return Culprit(
            near=tuple(bad[:LISTED]),
            message=f"not determined: the gradients of {len(bad)} modules that are not in one row "
            f"hold NaN or inf, first {module}",
        )
    if first > 0:
        after = gradients[first - 1].module
        return Culprit(
            origin="gradient",
            module=module,
            near=(module, after),
            message=f"the backward pass went bad between {after}, whose gradient is finite, and "
            f"{module}, whose gradient is the first that holds NaN or inf",
        )
    if loss is not None and math.isfinite(loss):
        return Culprit(
            near=(module, LOSS),
            message=f"not determined: the loss is finite ({loss:.4g}) and every gradient is not: "
            f"the backward pass went bad between the loss and {module}, or a forward pass held "
            "something that the loss masks",
        )
    said = "no loss was logged before the step" if loss is None else f"the loss is {loss}"
    return Culprit(message=f"not determined: every gradient holds NaN or inf, and {said}")


def _of_passes(forward: Forward, bad_weights: Sequence[BadWeight]) -> Culprit | None:
    """What the first bad pass says; None where all of them are fine."""
    count = len(forward.passes) + forward.unseen
    for number, one in enumerate(forward.passes, start=1):
        which = f" (forward pass {number} of {count})" if count > 1 else ""
        if one.inputs is Flag.BAD:
            said = f"what the model was called with holds NaN or inf{which}"
            return Culprit(origin="input", message=said)
        if one.calls and one.calls[-1].inputs is Flag.BAD:
            said = "what the model was called with is finite, and not what reached it"
            return Culprit(message=f"not determined: {said}: what wraps it, or a hook{which}")
        again = number - 1 == forward.repeated
        found = of_forward(one.calls, bad_weights) if one.calls else None
        if again and (found is None) != (one.outputs is not Flag.BAD):
            return _not_repeated(one, found, which)
        if found is not None:
            return _with(found, which)
        if one.outputs is Flag.BAD:
            found = of_weights(bad_weights) or Culprit(message="not determined: the model put out "
                                                       "NaN or inf of finite inputs")  # fmt: skip
            why = "its batch was not kept" if forward.repeated is not None else forward.unknown
            return _with(found, f"{which}; {why}" if why else which)
    return None


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
