"""Two policies in, the numbers in which they differ out; whatever else differs is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradwatch.policy.forms import Budget, Schedule
from gradwatch.policy.locating import Path, path_text, policy_error, shown
from gradwatch.policy.models import Policy
from gradwatch.policy.values import Section, Written

__all__ = ["number_changes"]

STATISTICS = ("z", "ratio", "quantile")
"""Which of them is given is what a limit is, not how large it is."""

NO_NUMBERS = ("depth", "ndim", "version")


def number_changes(running: Policy, changed: Policy) -> tuple[str, ...]:
    """`clip[0].limit 1 -> 0.5` for each number that a running policy is to take over.

    Raises:
        PolicyError: with a line for each other difference.
    """
    numbers, mistakes = [], []
    for path, before, after in _differences(running, changed, ()):
        if _may_change(path, before) and _may_change(path, after):
            numbers.append(f"{path_text(path)} {_said(before)} -> {_said(after)}")
        else:
            said = (
                f" cannot change while the run goes on, only numbers can. In force: "
                f"{_said(before)}. Received: {_said(after)}. Attach again to change it"
            )
            mistakes.append(changed.origin.mistake(path, said))
    if mistakes:
        raise policy_error(changed.source, mistakes)
    return tuple(numbers)


def _differences(before: Any, after: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    if before == after:
        return
    if isinstance(before, Section) and type(before) is type(after):
        given = before.model_fields_set | after.model_fields_set
        for key in type(before).model_fields:
            if key in given:  # another default follows from another key
                yield from _differences(getattr(before, key), getattr(after, key), (*path, key))
    elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, (*path, index))
    else:
        yield path, before, after


def _are_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, Section) for item in value)


def _may_change(path: Path, value: Any) -> bool:
    if path[-1] in NO_NUMBERS:
        return False
    if value is None:
        return path[-1] not in STATISTICS
    return isinstance(value, (int, float, Schedule, Budget)) and not isinstance(value, bool)


def _said(value: Any) -> str:
    if _are_sections(value):
        return f"{len(value)} entries"
    return shown(value.written() if isinstance(value, Written) else value)
