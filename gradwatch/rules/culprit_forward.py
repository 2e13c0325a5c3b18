"""Where a forward pass went bad: from flags of the calls in it to a culprit.

    Call, Call, ... of one pass  ->  of_forward  ->  input, weight, forward, or None

A module that makes bad outputs of good inputs is evidence; what may be masked on purpose is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from gradwatch.records import Culprit
from gradwatch.rules.culprit_weights import LISTED, BadWeight, name_of, owner

__all__ = ["MASKED", "Call", "Flag", "flag_of", "of_forward", "worst"]


class Flag(IntEnum):
    """What a set of values holds at worst."""

    FINE = 0
    """Finite values."""

    MASK = 1
    """From -inf to 0, as an attention mask or the logarithm of a probability."""

    UNKNOWN = 2
    """Something that was not looked into."""

    MINUS = 3
    """-inf beside other values: the logarithm of 0, or something masked on purpose."""

    BAD = 4
    """NaN or inf."""


MASKED = (Flag.MASK, Flag.MINUS)
"""Where -inf may be meant."""


def flag_of(low: float, high: float) -> Flag:
    """From the least and the largest value, both NaN where any is."""
    if math.isnan(low) or math.isnan(high) or high == math.inf:
        return Flag.BAD
    if low == -math.inf:
        return Flag.MASK if high == 0 else Flag.MINUS
    return Flag.FINE


def worst(flags: Iterable[Flag]) -> Flag:
    return max(flags, default=Flag.FINE)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module. The calls of a pass stand in the order in which they end, so that the
    last one is that of the whole model."""

    module: str
    """Its path; empty for the model itself."""

    inputs: Flag
    outputs: Flag
    entered: int = 0
    """Calls that had ended when this one began: those after it are inside of it."""


def of_forward(
    calls: Sequence[Call], bad_weights: Sequence[BadWeight] | None = ()
) -> Culprit | None:
    """The first module that makes bad outputs of good inputs; None where none does.

    Args:
        calls: of one pass; not empty.
        bad_weights: None where they are not known.
    """
    makes_bad = (
        i for i, c in enumerate(calls) if c.outputs is Flag.BAD and c.inputs is not Flag.BAD
    )
    first = next(makes_bad, None)
    if first is None:
        return None
    call = calls[first]
    if bad_weights is None:
        name = name_of(call.module)
        return Culprit(
            near=(name,),
            message=f"not determined: the outputs of {name} hold NaN or inf while its inputs are "
            "finite: its weights or its forward pass; an update was made before the host knew",
        )
    name, guilty = name_of(call.module), owner(call.module, bad_weights)
    if guilty is not None and len(bad_weights) > 1:
        return Culprit(
            origin="weight",
            near=tuple(name_of(one.modules[0]) for one in bad_weights[:LISTED]),
            message=f"weights of {len(bad_weights)} modules hold NaN or inf, so that the first is "
            f"not known; the outputs of {name} are the first that do",
        )
    if bad_weights and guilty is None:
        return Culprit(
            near=(name, name_of(bad_weights[0].modules[0])),
            message=f"not determined: the outputs of {name} hold NaN or inf while its inputs are "
            f"finite, and weights of {bad_weights[0].named} do, which it may use",
        )
    if guilty is not None:
        owned = call.module in guilty.modules
        how = "and so do its outputs" if owned else f"and so do the outputs of {name}"
        return Culprit(
            origin="weight",
            module=name_of(guilty.modules[0]),
            message=f"weights of {guilty.named} hold NaN or inf, {how}",
        )
    if (masked := _masked(calls, first)) is not None:
        return masked
    if call.inputs is Flag.UNKNOWN:
        return Culprit(
            near=(name,),
            message=f"not determined: {name} puts out NaN or inf, and what it was given could not "
            "be looked into",
        )
    near = _inside(calls, first)
    hidden = "" if calls[-1].outputs is Flag.BAD else "; the model masks it, but not its gradient"
    return Culprit(
        origin="forward",
        module=name,
        near=near,
        message=f"the outputs of {name} hold NaN or inf while its inputs are finite"
        f"{_between(near)}{hidden}",
    )


def _masked(calls: Sequence[Call], first: int) -> Culprit | None:
    """What went before a call that may be meant, and of which NaN is made where it meets the end of
    a row or another infinity."""
    call = calls[first]
    is_given = call.inputs in MASKED
    reach = calls[:first] if is_given else calls[call.entered : first]
    earlier = next((c for c in reach if c.outputs in MASKED), None)
    if earlier is None and not is_given:
        return None
    name = name_of(call.module)
    source = "its inputs" if earlier is None else f"the outputs of {name_of(earlier.module)}"
    return Culprit(
        near=(name,) if earlier is None else (name_of(earlier.module), name),
        message=f"not determined: {name} puts out NaN or inf, and {source} held -inf before: "
        "a mask that leaves nothing of a row, or a logarithm of 0",
    )


def _inside(calls: Sequence[Call], index: int) -> tuple[str, ...]:
    """The parts of a call between which it went bad: the last fine one, and the first that was
    given something bad."""
    inner = calls[calls[index].entered : index]
    bad = next((i for i, call in enumerate(inner) if call.inputs is Flag.BAD), len(inner))
    around = [call.module for call in (*inner[max(0, bad - 1) : bad], *inner[bad : bad + 1])]
    return tuple(dict.fromkeys(around))


def _between(parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return f", {'between ' if len(parts) > 1 else 'beside '}{' and '.join(parts)}"
