"""What stands behind the colons: numbers, counts, names and lists of them.

Pydantic types whose complaints are ours: `must be ...`, to be prefixed with the path of the entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, Protocol, runtime_checkable

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

__all__ = [
    "OFF",
    "Count",
    "Factor",
    "Fraction",
    "Groups",
    "Name",
    "Names",
    "NotNegative",
    "Positive",
    "Section",
    "Span",
    "Step",
    "Steps",
    "refuse",
]

MAX_COUNT = 10**15
"""Further than any run goes, and exact as a float64."""

MAX_SPAN = 100_000
"""Values that are kept in memory."""

MAX_NAME = 64
EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
STEP = re.compile(r"0|[1-9][0-9]{0,14}")
OFF = "none"
"""The word for what a policy leaves out though it is there by default."""

RESERVED = ("nonfinite", "overflow", "on_error")
"""Reasons for a skipped step that are not rules, and a key: no rule may be called so."""


@runtime_checkable
class Written(Protocol):
    """Whatever knows how a file would hold it."""

    def written(self) -> Any: ...


class Section(BaseModel):
    """A part of a policy: frozen, and no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def written(self, **defaults: Any) -> dict[str, Any]:
        """Its entries but for those that equal their default, as a file would hold them.

        Args:
            defaults: of the keys whose default depends on other keys.
        """
        fields = type(self).model_fields
        return {
            key: _plain(value)
            for key, value in self
            if value != defaults.get(key, fields[key].default)
        }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        alone = len(value) == 1 and not isinstance(value[0], Section)
        return value[0] if alone else [_plain(item) for item in value]
    if value is None:
        return OFF
    return value.written() if isinstance(value, Written) else value


def refuse(message: str) -> NoReturn:
    """A complaint that already has our form, from within a validator."""
    raise PydanticCustomError("policy", "{message}", {"message": message})


def _number(value: object) -> float:
    # YAML 1.1 takes 1e-7 for a word: it wants a dot and a signed exponent.
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse("must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse("must be finite")
    return number


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("must be a whole number")
    return value


def _step(value: object) -> int:
    # Not `010`: that is 8 to a plain YAML loader.
    if isinstance(value, str) and STEP.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("must be a step, a whole number without leading zeros")
    return value


def _text(value: object) -> str:
    if isinstance(value, bool):
        refuse("must be text: YAML reads yes, no, on and off as booleans unless quoted")
    if not isinstance(value, str):
        refuse("must be text")
    if not value:
        refuse("must not be empty")
    return value


def _name(value: object) -> str:
    name = _text(value)
    if not name.isprintable() or len(name) > MAX_NAME or name != name.strip():
        refuse(f"must be one line of at most {MAX_NAME} characters without blanks around it")
    if name in RESERVED:
        refuse("must be another name: this one is taken by the guard")
    return name


def _several(of_what: str, single: type) -> Callable[[object], object]:
    """One entry, or a list of them that is not empty."""

    def listed(value: object) -> object:
        if isinstance(value, single) and not isinstance(value, bool):
            return (value,)
        if not isinstance(value, (list, tuple)):
            refuse(f"must be {of_what} or a list of them")
        if not value:
            refuse("must not be empty. Leave the key out to select by it no further")
        return value

    return listed


def _one_or_many(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


Positive = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Fraction = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)]
Factor = Annotated[float, Field(ge=1), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(_whole)]
Span = Annotated[int, Field(ge=1, le=MAX_SPAN), BeforeValidator(_whole)]
Steps = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_whole)]
Step = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_step)]
Group = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(_text)]
Name = Annotated[
    str,
    BeforeValidator(_name),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_NAME}),
]
Names = Annotated[
    tuple[Text, ...],
    BeforeValidator(_several("text", str)),
    _one_or_many({"type": "string", "minLength": 1}),
]
Groups = Annotated[
    tuple[Group, ...],
    BeforeValidator(_several("the number of a parameter group", int)),
    _one_or_many({"type": "integer", "minimum": 0}),
]
