"""Whether weights that are not finite before an update are what went bad first.

A weight that no pass has used spoils nothing. It is evidence where its own gradient says that it
was used, where its module makes bad outputs of good inputs, and where gradients go bad beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch.records import Culprit

__all__ = ["LISTED", "BadWeight", "name_of", "of_weights", "owner"]

LISTED = 5


@dataclass(frozen=True, slots=True)
class BadWeight:
    """Weights of one module that held NaN or inf before the update."""

    modules: tuple[str, ...]
    """Its path; more than one where they are shared."""

    is_used: bool = False
    """Whether their gradient is not 0 where they are not finite. Where it is, they may have been
    used all the same: in front of tanh an inf has no slope."""

    @property
    def named(self) -> str:
        first, *shared = map(name_of, self.modules)
        return f"{first} (shared with {', '.join(shared)})" if shared else first


def name_of(module: str) -> str:
    return module or "(model)"


def owner(module: str, bad_weights: Sequence[BadWeight]) -> BadWeight | None:
    """Whose weights explain that the outputs of a module are bad and its inputs are not: its own,
    or those of a part of it that it is known to have used."""
    for one in bad_weights:
        if module in one.modules:
            return one
    inside = f"{module}." if module else ""
    parts = (w for w in bad_weights if any(name.startswith(inside) for name in w.modules))
    return next((part for part in parts if part.is_used), None)


def of_weights(bad_weights: Sequence[BadWeight], beside: Sequence[str] = ()) -> Culprit | None:
    """What weights say where no forward pass tells which of them was first; None where nothing.

    Args:
        beside: modules between which gradients are known to have gone bad.
    """
    found = list(bad_weights)
    if not found:
        return None
    near = tuple(name_of(one.modules[0]) for one in found[:LISTED])
    names = ", ".join(one.named for one in found[:LISTED]) + (", ..." * (len(found) > LISTED))
    if not any(one.is_used or set(map(name_of, one.modules)) & set(beside) for one in found):
        return Culprit(
            near=near,
            message=f"not determined: weights of {names} hold NaN or inf, and their gradient does "
            "not show that the step used them",
        )
    said = f"weights of {names} hold NaN or inf before the update"
    if len(found) == 1:
        return Culprit(origin="weight", module=near[0], near=near, message=said)
    said += f": {len(found)} modules, so that the first is not known"
    return Culprit(origin="weight", near=near, message=said)
