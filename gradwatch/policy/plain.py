"""A dict in, the same plain data out as reading a file gives, within the same bounds."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwatch.policy.locating import Mistake, Path, Position, path_text, shown

__all__ = ["MAX_DEPTH", "MAX_VALUES", "Document", "Unreadable", "is_text", "read_mapping"]

MAX_BITS = 300
MAX_DEPTH = 16
MAX_VALUES = 10_000
"""A rule takes about ten values; aliases count each time they are used."""


@dataclass
class Document:
    """Plain data, where its entries stand, and what was already wrong with them."""

    data: Any = None
    positions: dict[Path, Position] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    """Entries of which nothing more need be said."""


class Unreadable(Exception):
    """Carries the one mistake after which reading on is pointless."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.message)
        self.mistake = mistake


def read_mapping(mapping: Mapping[Any, Any]) -> Document:
    """Plain dicts, lists and scalars; anything else is left for the decoder to refuse.

    Raises:
        Unreadable: the mapping is nested too deep or too large.
    """
    document = Document()
    document.data = _Walk(document).value(mapping, ())
    return document


class _Walk:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0

    def value(self, value: Any, path: Path) -> Any:
        self._values += 1
        if len(path) > MAX_DEPTH:
            raise Unreadable(Mistake(f"nested deeper than {MAX_DEPTH} levels"))
        if self._values > MAX_VALUES:
            raise Unreadable(Mistake(f"a policy must hold at most {MAX_VALUES} values"))
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)):
            return [self.value(item, (*path, index)) for index, item in enumerate(value)]
        value = _native(value)
        if isinstance(value, str) and not is_text(value):
            said = "holds what is not text"
        elif value is None or isinstance(value, (bool, int, float, str)):
            return value
        else:
            said = "must be a number, text, a list or a mapping"
        self._mistake(f"{path_text(path)} {said}. Received: {shown(value)}")
        self._document.left_out.append(path)
        return value

    def _mapping(self, mapping: Mapping[Any, Any], path: Path) -> dict[str | int, Any]:
        entries: dict[str | int, Any] = {}
        for key, value in mapping.items():
            key = _native(key)
            if isinstance(key, bool) or not isinstance(key, (str, int)) or not is_text(str(key)):
                said = f"a key must be a word or a whole number. Received: {shown(key)}"
                self._mistake(f"{path_text(path)}: {said}")
                continue
            entries[key] = self.value(value, (*path, key))
        return entries

    def _mistake(self, message: str) -> None:
        self._document.mistakes.append(Mistake(message))


def _native(value: Any) -> Any:
    """NumPy's scalars as Python's, and integers that are too long to print as infinite."""
    if isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, numbers.Integral):
        number = int(value)
        return number if number.bit_length() <= MAX_BITS else math.inf
    return float(value) if isinstance(value, np.floating) else value


def is_text(value: str) -> bool:
    """Whether it can be written down; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
