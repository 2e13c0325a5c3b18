"""Where along the backward pass gradients went bad, from which of them are finite.

parameters in backward order  ->  ModuleGradient, ModuleGradient, ...  ->  of_gradients
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch.records import Culprit
from gradwatch.rules.culprit_weights import LISTED, name_of

__all__ = ["LOSS", "ModuleGradient", "are_all_bad", "border", "modules_of", "of_gradients"]

LOSS = "the loss"


@dataclass(frozen=True, slots=True)
class ModuleGradient:
    """The gradients of one module's own parameters that a backward pass comes to in a row."""

    module: str
    is_finite: bool
    bias_only: bool = False
    """Whether that of its bias is finite although others are not."""

    bias_too: bool = True
    """Whether that of a bias is not finite: what the module hands back was bad, whatever it was
    given."""

    is_mixed: bool = False
    """Whether some are finite and some are not, in another way than that."""


def modules_of(
    parameters: Sequence[str], finite: Sequence[bool], order: Sequence[int]
) -> tuple[ModuleGradient, ...]:
    """The gradients of modules in backward order, from those of parameters.

    Args:
        parameters: names, of all [P].
        finite: [P] whether the gradient of each is finite.
        order: places of those parameters whose place in the backward pass is known.
    """
    rows = itertools.groupby(order, key=lambda place: parameters[place].rpartition(".")[0])
    return tuple(_of_row(module, list(row), parameters, finite) for module, row in rows)


def _of_row(
    module: str, places: Sequence[int], parameters: Sequence[str], finite: Sequence[bool]
) -> ModuleGradient:
    is_bias = [parameters[i].rpartition(".")[2].startswith("bias") for i in places]
    biases = [finite[i] for i, bias in zip(places, is_bias, strict=True) if bias]
    others = [finite[i] for i, bias in zip(places, is_bias, strict=True) if not bias]
    bias_only = bool(biases) and all(biases) and not any(others)
    every = [finite[i] for i in places]
    return ModuleGradient(
        name_of(module),
        all(every),
        bias_only=bias_only,
        bias_too=not all(biases),
        is_mixed=any(every) and not all(every) and not bias_only,
    )


def are_all_bad(gradients: Sequence[ModuleGradient]) -> bool:
    """Whether gradients are bad from the first one of the backward pass on."""
    if not gradients or gradients[0].bias_only:
        return False
    return not any(one.is_finite or one.is_mixed for one in gradients)


def border(gradients: Sequence[ModuleGradient]) -> tuple[str, ...]:
    """The first module of the backward pass whose gradient is bad, and the one before it."""
    first = next((i for i, one in enumerate(gradients) if not one.is_finite), None)
    if first is None:
        return ()
    return tuple(one.module for one in reversed(gradients[max(0, first - 1) : first + 1]))


def of_gradients(
    gradients: Sequence[ModuleGradient],
    loss: float | None,
    *,
    forward_is_fine: bool = False,
    is_order_sure: bool = False,
    is_loss_whole: bool = False,
) -> Culprit:
    """Where gradients went bad, where that can be told from them.

    Args:
        forward_is_fine: whether all that the model was given and has put out is known to be finite.
        is_order_sure: whether every backward pass is known to have the order of `gradients`.
        is_loss_whole: whether it is known that nothing but the loss that was logged was handed back
            to the model.
    """
    found = _along_the_pass(gradients, loss, forward_is_fine)
    if found.origin is None:
        return found
    if not is_order_sure:
        return Culprit(
            near=found.near,
            message=f"not determined: {found.message}, in the order of another backward pass; "
            "whether that of this step had the same is not known",
        )
    if is_loss_whole or len(gradients) == 1:
        return found
    said = f"{found.message}, if the loss that was logged is the whole of it"
    return Culprit(origin=found.origin, module=found.module, near=found.near, message=said)


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
    if gradients[first].is_mixed:
        return Culprit(
            near=(module,),
            message=f"not determined: some gradients of {module} are finite and some are not",
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
        return Culprit(
            origin="gradient",
            module=module,
            near=(module,),
            message=f"the gradient of {module} is the first in backward order that holds NaN or "
            f"inf, behind {gradients[first - 1].module}, whose gradient is finite: look at what "
            f"uses the outputs of {module}",
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
