"""Entries with a form of their own: a schedule by step, a budget of skips."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, WithJsonSchema

from gradwatch.policy.values import Count, Positive, Step, refuse

__all__ = ["Budget", "BudgetText", "Schedule", "ScheduleMap", "StairsMap", "has_steps"]

BUDGET = re.compile(r"([0-9]{1,15})\s*/\s*([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Values by optimizer step, `{0: 10, 2000: 1}`."""

    points: tuple[tuple[int, float], ...]
    """(step, value), steps ascending; at least one."""

    def written(self) -> dict[int, float]:
        return dict(self.points)


def _schedule(of: Any) -> Callable[[Any], Schedule]:
    mapping = TypeAdapter(dict[Step, of])

    def schedule(value: Any) -> Schedule:
        written = dict(value.points) if isinstance(value, Schedule) else value
        points = mapping.validate_python(written)
        if not points:
            refuse("must hold at least one step")
        if len(points) < len(written):
            refuse("must hold each step once")
        return Schedule(tuple(sorted(points.items())))

    return schedule


def _by_step(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "object",
            "description": "Values by optimizer step.",
            "patternProperties": {"^[0-9]+$": item},
            "additionalProperties": False,
            "minProperties": 1,
        }
    )


ScheduleMap = Annotated[
    Schedule,
    BeforeValidator(_schedule(Positive)),
    _by_step({"type": "number", "exclusiveMinimum": 0}),
]
StairsMap = Annotated[
    Schedule,
    BeforeValidator(_schedule(Count)),
    _by_step({"type": "integer", "minimum": 1}),
]


@dataclass(frozen=True, slots=True)
class Budget:
    """How many skips are tolerated within how many steps, `50/1000`."""

    skips: int
    steps: int

    def written(self) -> str:
        return f"{self.skips}/{self.steps}"


def _budget(value: object) -> Budget:
    if isinstance(value, Budget):
        value = value.written()
    match = BUDGET.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        refuse("must be skips/steps, such as 50/1000")
    budget = Budget(int(match[1]), int(match[2]))
    if not 1 <= budget.skips < budget.steps:
        refuse("must allow at least 1 skip, and fewer skips than steps")
    return budget


BudgetText = Annotated[
    Budget,
    BeforeValidator(_budget),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+\s*/\s*[0-9]+$"}),
]


def is_step(key: object) -> bool:
    """Whether a key of a mapping means a step, so that the mapping is a schedule."""
    return isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdigit())


def has_steps(mapping: Iterable[object]) -> bool:
    return any(is_step(key) for key in mapping)
